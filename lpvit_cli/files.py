"""Files and folders written whole or not at all, and what identifies their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpvit_cli.errors import EnvironmentFault


def publish(work: Path, target: Path) -> None:
    """Put a complete folder in its place; the old one goes only when the new one stands."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` when all is well, and goes when not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


DISK_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error a user can act on."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{path}: cannot write: {error.strerror}"
        raise EnvironmentFault(what, "check permissions and free space, or choose another --output") from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code or int(code[1]) not in DISK_ERRORS:
            raise
        raise EnvironmentFault(
            f"{path}: cannot write: {os.strerror(int(code[1]))}", "free space, or choose another --output"
        ) from error


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def content_id(path: Path) -> str | None:
    """A file's hash, or the hash of all file names below a folder (reading ImageNet itself would take an hour)."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    if path.is_dir():
        return digest(
            sorted(os.path.relpath(os.path.join(top, name), path) for top, _, names in os.walk(path) for name in names)
        )
    return None
