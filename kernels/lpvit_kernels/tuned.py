"""The choices that tuning made, in memory and in one JSON file that several processes may write.

The file is tuned.json in $LPVIT_CACHE, or in lpvit/ of the user's cache folder. One that cannot be read counts as empty and is
written anew.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """A backend, and for triton how it is tiled (None: its default)."""

    backend: str
    config: Any = None  # gpu.configs.Config


@dataclass(frozen=True)
class Tuned:
    """The fastest choice of a case, and what every candidate took."""

    choice: Choice
    times_us: dict[str, float]  # by backend; of triton the best configuration's


_loaded: dict[str, dict[str, Any]] | None = None  # entries as the file has them
_changes = 0


def path() -> Path:
    folder = os.environ.get("LPVIT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lpvit"
    return Path(folder) / "tuned.json"


def find(key: str) -> Tuned | None:
    """What was tuned for a case, in this or an earlier process."""
    global _loaded
    if _loaded is None:
        _loaded = _read()
    return _tuned(_loaded[key]) if key in _loaded else None


def changes() -> int:
    """Grows when choices change: for caches of choices."""
    return _changes


def record(entries: dict[str, Tuned]) -> None:
    """Add to the file, and keep what other processes have added. Where it cannot be written, this process remembers."""
    global _loaded, _changes
    target, new = path(), {key: asdict(entry) for key, entry in entries.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            _loaded = _read() | new
            _replace(target, _loaded)
    except OSError as error:
        _loaded = (_loaded or {}) | new
        warnings.warn(f"{target} cannot be written ({error}): what is tuned is forgotten with this process", stacklevel=2)
    _changes += 1


def _replace(target: Path, entries: dict[str, dict[str, Any]]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".tuned", delete=False) as file:
        json.dump({"format": FORMAT, "entries": entries}, file, indent=1)
    os.replace(file.name, target)


def forget() -> None:
    """Read the file anew at the next question."""
    global _loaded, _changes
    _loaded = None
    _changes += 1


def _read() -> dict[str, dict[str, Any]]:
    try:
        document = json.loads(path().read_text())
        if document["format"] != FORMAT:
            return {}
        entries: dict[str, dict[str, Any]] = document["entries"]
        if not all(entry["choice"]["backend"] in entry["times_us"] for entry in entries.values()):
            raise ValueError("a choice that was not timed")
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path()} cannot be read ({error!r}): nothing counts as tuned until it is written anew", stacklevel=2)
        return {}


def _tuned(entry: dict[str, Any]) -> Tuned:
    config = entry["choice"]["config"]
    if config is not None:
        from lpvit_kernels.gpu.configs import Config

        config = Config(**config)
    return Tuned(Choice(entry["choice"]["backend"], config), entry["times_us"])
