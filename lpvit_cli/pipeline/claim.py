"""Claiming a run folder: whose it is, one process at a time, and tidying up after processes that were killed.

Beside `NAME/`, the artefact of a stage, there may be `.NAME.partial` (being written, or being removed), `.NAME.old` (the one
before, while a new one takes its place), `.NAME.progress` (what a stage goes on from) and `..NAME.*.rubbish-*` (what could not
be removed). No link is followed to write: what has a name that lpvit writes to and is something else is refused before any
work. An artefact may be a link while it is only read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import beside, discard, remove, rubbish_of, writing
from lpvit_cli.pipeline.record import FILE, Begun, Record, has_state

LOCK, RECIPE = ".lock", "recipe.yaml"
KINDS = ("partial", "old", "progress")
ELSEWHERE = "move it, or choose another --output"
LINKED = "put a copy in its place (cp -rL), or choose another --output"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def claimed(folder: Path, name: str, artefacts: Sequence[str], overwrite: bool) -> Iterator[None]:
    """Inside, the folder is tidy and belongs to this process and the recipe `name`. `artefacts`: folders that stages write.

    Raises UsageError where it holds something else, unless `overwrite` (which removes what the other run has made), and
    EnvironmentFault where another process is at work in it, or it cannot be written.
    """
    with writing(folder):
        _require_ours(folder, name, artefacts, overwrite)  # no lock is left in a folder that is refused
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"{folder}: cannot create: {error.strerror}", "choose another --output") from error
        with _locked(folder):
            foreign = _require_ours(folder, name, artefacts, overwrite)  # another lpvit may have been faster
            for path in _temporary(folder / RECIPE):
                with suppress(OSError):
                    path.unlink()
            for artefact in artefacts:
                _tidy(folder / artefact, taken_over=bool(foreign))
            yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentFault(
                f"{folder}: another lpvit is working in this folder", "wait for it, or choose another --output"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(f"{folder}: this file system has no locks; let no other lpvit work in this folder", stacklevel=2)
        yield
    finally:
        os.close(lock)


def _require_ours(folder: Path, name: str, artefacts: Sequence[str], overwrite: bool) -> str:
    """What the folder holds that is not a run of this recipe, where that may be removed; empty when it is free or ours."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is a file, a run needs a folder", "choose another --output")
    if folder.is_symlink() and not folder.exists():
        raise UsageError(f"{folder}: is a link to nothing", "make the folder that it points to, or choose another --output")
    if not folder.is_dir():
        return ""
    _require_own_kinds(folder, artefacts)
    foreign = _foreign(folder, name)
    if foreign and not overwrite:
        raise UsageError(f"{folder}: {foreign}", "choose another --output, or pass --overwrite to take it over")
    return foreign


def _foreign(folder: Path, name: str) -> str:
    made_by = folder / RECIPE
    if {*folder.iterdir()} <= {folder / LOCK, *_temporary(made_by)}:  # only just claimed, or not at all
        return ""
    text = made_by.read_text(encoding="utf-8", errors="replace") if made_by.is_file() else ""
    owner = re.search(r"^name: (.*)$", text, re.MULTILINE)
    if owner is None:
        return "is not empty and not a run folder"
    return "" if owner[1].strip("'\"") == name else f"holds a run of recipe {owner[1]!r}, not {name!r}"


def _require_own_kinds(folder: Path, artefacts: Sequence[str]) -> None:
    """Whatever is named like a file or folder of ours must be one."""
    for path in (folder / LOCK, folder / RECIPE):
        _require(path, stat.S_ISREG, "file")
    for artefact in (folder / name for name in artefacts):
        for path in (beside(artefact, kind) for kind in KINDS):
            _require(path, stat.S_ISDIR, "folder")
        if not (artefact / FILE).is_file():
            require_own_folder(artefact)
        if artefact.exists() and not (artefact / FILE).is_file():
            raise UsageError(f"{artefact}: is in the way and not made by lpvit", ELSEWHERE)
        progress = beside(artefact, "progress")
        if link := next((path for path in progress.rglob("*") if path.is_symlink()), None):
            raise UsageError(f"{link}: is a link, which a run does not follow", LINKED)


def require_own_folder(artefact: Path) -> None:
    """Raise UsageError unless a stage can write there: no link, no file."""
    _require(artefact, stat.S_ISDIR, "folder")


def _temporary(path: Path) -> Iterator[Path]:
    """What kills have left of writing a file."""
    return (left for left in path.parent.glob(f"{beside(path, 'tmp').name}*") if left.is_file() and not left.is_symlink())


def _require(path: Path, is_kind: Callable[[int], bool], kind: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UsageError(f"{path}: is a link, which a run does not follow", LINKED)
    if not is_kind(mode):
        raise UsageError(f"{path}: is in the way: a run keeps a {kind} of this name", ELSEWHERE)


def _tidy(artefact: Path, taken_over: bool) -> None:
    """Finish an interrupted publication, and remove what nobody goes on from; with `taken_over` also what a run has made."""
    partial, old, progress = (beside(artefact, kind) for kind in KINDS)
    if (old / FILE).is_file() and not artefact.exists():
        old.rename(artefact)
    earlier = artefact.parent.glob(f"{progress.name}-*")  # by an earlier version
    torn = [path for kind in ("tmp", "partial") for path in progress.rglob(f".*.{kind}-*")]
    for leftover in (old, partial, *earlier, *torn, *rubbish_of(artefact)):
        with suppress(OSError):  # where its name is needed it is cleared then
            remove(leftover)
    if taken_over:
        discard(artefact, partial)
    if taken_over or not _can_go_on(progress, artefact):
        discard(progress, partial)


def _can_go_on(progress: Path, artefact: Path) -> bool:
    """Whether a stage can go on from its progress, which it cannot once its artefact was published."""
    begun = Begun.load(progress)
    if begun is None or not has_state(progress):
        return False
    try:
        made = Record.load(artefact)
    except EnvironmentFault:
        made = None
    return made is None or not made.made_from(begun)
