"""The base of all recipe sections: closed, frozen, and able to tell which of its keys somebody has read.

A stage runs inside `recording(...)`, so that what its artefact depends on is what it read, and no list can be forgotten.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationInfo

Place = tuple[str, ...]
PLACE, CHANGED = "place in the recipe", "fields that are not the recipe's"  # entries of a section's __dict__, no fields
_recordings: list[Reads] = []


class Reads:
    """The dotted keys that were read, in the order of first reading. `on_new` hears of every key that is new."""

    def __init__(self, on_new: Callable[[], None] = lambda: None):
        self.keys: dict[str, None] = {}
        self.on_new = on_new

    def add(self, *keys: str) -> None:
        new = [key for key in keys if key not in self.keys]
        self.keys |= dict.fromkeys(new)
        if new:
            self.on_new()


@contextmanager
def recording(reads: Reads) -> Iterator[Reads]:
    """Add to `reads` every key of a placed recipe that is read inside."""
    _recordings.append(reads)
    try:
        yield reads
    finally:
        _recordings.remove(reads)


def note_reads(keys: list[str]) -> None:
    """Count these keys as read: somebody else has read them for whoever is recorded now."""
    for reads in _recordings:
        reads.add(*keys)


class Section(BaseModel):
    """A part of a recipe. Reading a field is recorded, `peek` is not."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if _recordings and not name.startswith("_") and not isinstance(value, Section):
            more = super().__getattribute__("__dict__")
            place = more.get(PLACE)
            if place is not None and name in type(self).model_fields and name not in more.get(CHANGED, ()):
                note_reads([".".join((*place, name))])
        return value

    def peek(self, name: str) -> Any:
        """A field that changes how fast a result comes, not what it is: reading it so is not recorded."""
        return self.__dict__[name]

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """As pydantic's; all keys below count as read."""
        place = self.__dict__.get(PLACE)
        if _recordings and place is not None:
            note_reads([".".join((*place, key)) for key in self.leaves()])
        return super().model_dump(**options)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's; what is updated is not the recipe's any more, and reading it is not recorded."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__[CHANGED] = {*self.__dict__.get(CHANGED, ()), *(update or ())}
        return copied

    def plain(self) -> dict[str, Any]:
        """The section as JSON values; nothing counts as read."""
        return super().model_dump(mode="json")

    def place(self, at: Place = ()) -> None:
        """Tell this section and those below where they stand in their recipe."""
        self.__dict__[PLACE] = at
        for name in type(self).model_fields:
            if isinstance(value := self.__dict__[name], Section):
                value.place((*at, name))

    def leaves(self, prefix: str = "") -> Iterator[str]:
        """The dotted names of all fields that are no section, from here."""
        for name in type(self).model_fields:
            value = self.__dict__[name]
            if isinstance(value, Section):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield prefix + name

    def find(self, dotted: str) -> Any:
        """The value at a dotted name, not recorded; None where a section above it is left out."""
        value: Any = self
        for name in dotted.split("."):
            value = value.__dict__.get(name) if isinstance(value, Section) else None
        return value

    @classmethod
    def keys(cls) -> list[str]:
        """What may be written in this section."""
        return list(cls.model_fields)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, of dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def absolute(path: Path, base: Path) -> Path:
    """The whole path, counted from `base`, with ~ for the home folder. ValueError where no file can have it."""
    try:
        whole = (base / path.expanduser()).resolve()
        whole.lstat()
    except RuntimeError as error:  # ~nosuchuser, and a circle of links
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"{path}: {error.strerror}") from error
    return whole


def beside_the_recipe(path: Path | None, info: ValidationInfo) -> Path | None:
    """A relative path counts from the recipe's folder; in a copy of a shipped recipe, also from that of the original."""
    if path is None:
        return None
    if path.is_absolute() or not info.context:
        return absolute(path, Path())
    beside, shipped = absolute(path, info.context["folder"]), absolute(path, recipes_folder())
    return shipped if shipped.exists() and not beside.exists() else beside


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or in the checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"
