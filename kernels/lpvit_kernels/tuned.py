"""The choices that tuning made, in memory and in one JSON file that several processes may write.

The file is tuned.json in $LPVIT_CACHE, or in lpvit/ of the user's cache folder. One that cannot be read counts as empty and is
written anew; entries that this version cannot use are left out.
"""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from filelock import FileLock

from lpvit_kernels.home import cache_folder

FORMAT = 1
CHOICES = ("triton", "strided", "gathered", "batched", "dense")


@dataclass(frozen=True)
class Config:
    """How a GPU kernel is tiled.

    tile         tokens of one program (weight_gradient: neighbouring blocks of one program)
    step         features of one step of its loop (weight_gradient: tokens)
    warps        of one program
    stages       of the software pipeline
    descriptors  tensor descriptors (TMA) instead of pointers: compute capability 9.0 and newer
    splits       weight_gradient: parts of the tokens that are computed apart, then summed
    registers    a thread may have at most; None: as many as the compiler likes
    """

    tile: int
    step: int
    warps: int
    stages: int
    descriptors: bool = False
    splits: int = 1
    registers: int | None = None


@dataclass(frozen=True)
class Choice:
    """A backend, and for triton how it is tiled (None: its default)."""

    backend: str
    config: Config | None = None


@dataclass(frozen=True)
class Tuned:
    """The fastest choice of a case, and what every candidate took."""

    choice: Choice
    times_us: dict[str, float]  # by backend; of triton the best configuration's


_loaded: dict[str, Tuned] | None = None
_changes = 0


def path() -> Path:
    return cache_folder() / "tuned.json"


def find(key: str) -> Tuned | None:
    """What was tuned for a case, in this or an earlier process."""
    global _loaded
    if _loaded is None:
        _loaded = _read(path())
    return _loaded.get(key)


def changes() -> int:
    """Grows when choices change: for caches of choices."""
    return _changes


def record(entries: dict[str, Tuned]) -> None:
    """Add to the file, and keep what other processes have added. Where it cannot be written, this process remembers."""
    global _loaded, _changes
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            _loaded = _read(path()) | entries
            _replace(target, _loaded)
    except (OSError, NotImplementedError) as error:  # the latter where the file system has no locks
        _loaded = (_loaded or {}) | entries
        warnings.warn(f"{target} cannot be written ({error}): what is tuned is forgotten with this process", stacklevel=2)
    _changes += 1


def keep(file: Path) -> None:
    """Write all that is tuned now to `file`, for `using`, unless there is one. Raises OSError."""
    global _loaded
    if not file.is_file():
        if _loaded is None:
            _loaded = _read(path())
        _replace(file, _loaded)


@contextmanager
def using(file: Path) -> Iterator[None]:
    """Inside, what `file` holds is all that counts as tuned: long work goes on with the choices that it began with."""
    global _loaded, _changes
    before, _loaded = _loaded, _read(file)
    _changes += 1
    try:
        yield
    finally:
        _loaded = before
        _changes += 1


def _replace(target: Path, entries: dict[str, Tuned]) -> None:
    """Whole or not at all."""
    document = {"format": FORMAT, "entries": {key: asdict(entry) for key, entry in entries.items()}}
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with beside.open("x") as file:
            json.dump(document, file, indent=1)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def forget() -> None:
    """Read the file anew at the next question."""
    global _loaded, _changes
    _loaded = None
    _changes += 1


def _read(file: Path) -> dict[str, Tuned]:
    try:
        document = json.loads(file.read_text())
        if document["format"] != FORMAT:
            return {}
        entries = {key: _tuned(entry) for key, entry in document["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{file} cannot be read ({error!r}): nothing counts as tuned until it is written anew", stacklevel=2)
        return {}
    return {key: entry for key, entry in entries.items() if entry}


def _tuned(entry: dict[str, Any]) -> Tuned | None:
    """None if its backend or configuration is none of this version's; an error if it never was an entry."""
    choice, times = entry["choice"], {name: float(time) for name, time in entry["times_us"].items()}
    if choice["backend"] not in times:
        raise ValueError("a choice that was not timed")
    config = choice["config"]
    if choice["backend"] not in CHOICES or not (config is None or _is_config(config)):
        return None
    return Tuned(Choice(choice["backend"], None if config is None else Config(**config)), times)


def _is_config(config: Any) -> bool:
    """Whether it names every field and has numbers that can be meant."""
    if not isinstance(config, dict) or config.keys() != {field.name for field in fields(Config)}:
        return False
    numbers = [value for name, value in config.items() if name != "descriptors" and (name, value) != ("registers", None)]
    return type(config["descriptors"]) is bool and all(type(number) is int and number > 0 for number in numbers)
