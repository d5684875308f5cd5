"""Files and folders written whole or not at all, and what identifies their content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from lpvit_cli.errors import EnvironmentFault, printable

RUBBISH = "rubbish"


def publish(work: Path, target: Path) -> None:
    """Put a complete folder in its place; the old one goes only when the new one stands."""
    old = beside(target, "old")
    clear(old)
    if target.exists():
        target.rename(old)
    work.rename(target)
    with suppress(OSError):  # it stands: an old one that cannot go is no failure
        remove(old)


def beside(path: Path, kind: str) -> Path:
    """Where what belongs to `path` lies while it is no file or folder of its own: `.name.kind`."""
    return path.with_name(f".{path.name}.{kind}")


def fresh(path: Path, kind: str) -> Path:
    """As `beside`, a name that no other process and no thread uses."""
    return beside(path, f"{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if there is one. Raises OSError where it cannot go."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def clear(path: Path) -> None:
    """Free a name. What cannot be removed (NFS keeps files that somebody has open) gets another, for `rubbish_of` to find."""
    try:
        remove(path)
    except OSError:
        path.rename(fresh(path, RUBBISH))


def rubbish_of(path: Path) -> Iterator[Path]:
    """What `clear` could not remove of `path`, and of what lies beside it."""
    for name in (path.name, beside(path, "*").name):
        yield from path.parent.glob(f".{name}.{RUBBISH}-*")


def discard(folder: Path, rubbish: Path) -> None:
    """Remove a folder by way of the name `rubbish`, so that a kill never leaves a part of it under its own."""
    clear(rubbish)
    if folder.exists():
        folder.rename(rubbish)
        clear(rubbish)


def open_unlinked(path: Path, flags: int) -> IO[str]:
    """A text file to write, never through a link; made where it is not there. `flags` as of os.open. Raises OSError."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)
    return os.fdopen(number, "w", encoding="utf-8")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it becomes `path` when all is well, and goes when not."""
    partial = fresh(path, "partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link at `path` is replaced, not followed."""
    temporary = fresh(path, "tmp")
    try:
        with open_unlinked(temporary, os.O_EXCL) as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


DISK_ERRORS = {  # and what helps
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), "free space"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "check permissions"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG), "look what lies there"),
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY, errno.ESTALE), "close what has it open, or mount the disk again"),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error a user can act on."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        helps = DISK_ERRORS[error.errno]
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{path}: cannot write: {error.strerror}"
        raise EnvironmentFault(what, f"{helps}, or choose another --output") from error
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if not code or int(code[1]) not in DISK_ERRORS:
            raise
        raise EnvironmentFault(
            f"{path}: cannot write: {os.strerror(int(code[1]))}", f"{DISK_ERRORS[int(code[1])]}, or choose another --output"
        ) from error


MAX_DEPTH = 100  # of nested JSON: what lpvit and its libraries write has a tenth of it


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, is nested too deeply, or holds no Unicode text."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            json.dumps(value, ensure_ascii=False).encode()  # a half of a surrogate pair could not be printed or written
            return value
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError where it cannot be read, and ValueError as `parse_json`."""
    require_regular(path)
    return parse_json(path.read_bytes())


def require_regular(path: Path) -> None:
    """Raise ValueError for pipes and devices, which may have no end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError("not a regular file")


def reason(error: BaseException) -> str:
    """What an exception of a library says, as a part of one line: its first line that says something, shortened."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        text = f"{where}: {first['msg']}" if where else first["msg"]
    else:
        text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    line = f"has no {line}" if isinstance(error, KeyError) else line
    return printable(line, 300)


@contextmanager
def scratch_in(work: Path) -> Iterator[Path]:
    """For files that are measured and not kept: below `work`, so that a kill leaves none that nobody removes."""
    folder = work / "scratch"
    folder.mkdir()
    yield folder
    with suppress(OSError):
        remove(folder)


def require_temporary_folder() -> None:
    """Torch's exporter needs one, and without it fails in words that say nothing of disks. Raises EnvironmentFault."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise EnvironmentFault(
            f"no folder for temporary files can be written: {reason(error)}",
            "free space there, or set TMPDIR to another folder",
        ) from error


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_id(path: Path) -> str | None:
    """A file's hash, or the hash of all file names below a folder (reading ImageNet itself would take an hour)."""
    if path.is_file():
        return sha256_of(path)[:16]
    if path.is_dir():
        return digest(
            sorted(os.path.relpath(os.path.join(top, name), path) for top, _, names in os.walk(path) for name in names)
        )
    return None
