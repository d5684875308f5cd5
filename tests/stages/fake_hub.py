"""The part of the Hugging Face hub's HTTP interface that an upload needs, on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeHub:
    """What has arrived. `refuses`: the status that every request gets instead."""

    def __init__(self, refuses: int | None = None):
        self.refuses = refuses
        self.endpoint = ""
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}  # of the repository, by path
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.tokens: set[str | None] = set()

    def answer(self, method: str, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.endpoint}/{self.created[-1]['organization']}/{self.created[-1]['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/tree/" in path:
            return [{"type": "file", "path": name, "oid": "0" * 40, "size": len(data)} for name, data in self.files.items()]
        if "/preupload/" in path:
            return {"files": [{**file, "uploadMode": mode(file), "shouldIgnore": False} for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return {"objects": [{**o, "actions": {"upload": {"href": f"{self.endpoint}/large/{o['oid']}"}}} for o in objects]}
        if method == "PUT" and path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            self.large[path.removeprefix("/large/")] = body
            return {}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                self.commit(line["key"], line["value"])
            made = self.created[-1]
            return {"commitUrl": f"{self.endpoint}/{made['organization']}/{made['name']}/commit/1", "commitOid": "1"}
        raise AssertionError(f"{method} {path} is not known to this hub")

    def commit(self, key: str, value: dict[str, Any]) -> None:
        if key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = self.large[value["oid"]]
        elif key == "deletedFile":
            del self.files[value["path"]]
        else:
            assert key == "header"


def mode(file: dict[str, Any]) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".onnx", ".data")) else "regular"


@contextmanager
def serve(hub: FakeHub) -> Iterator[None]:
    """`hub` listens at `hub.endpoint` meanwhile."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            body = self.read()
            if not self.path.startswith("/large/"):
                hub.tokens.add(self.headers.get("Authorization"))
            found = {} if hub.refuses else hub.answer(self.command, self.path.partition("?")[0], body)
            answer = json.dumps(found).encode()
            self.send_response(hub.refuses or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = respond

        def read(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
