"""stage.json: what an artefact depends on, and how it came about. inputs.json: what progress towards one depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import read_json, reason, replace_text
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.content import model_content

FILE = "stage.json"
INPUTS = "inputs.json"  # in a progress folder
MODEL_NAME = ("model.name", "teacher.name")


@dataclass(frozen=True)
class Record:
    """`reads`: the recipe keys read while the artefact was made; `inputs`: their values and all else it depends on."""

    stage: str
    fingerprint: str
    inputs: dict[str, Any]
    created: str
    duration_s: float
    command: str
    git_commit: str | None
    reads: list[str] = field(default_factory=list)
    device: str = ""

    def save(self, folder: Path) -> None:
        replace_text(folder / FILE, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record in an artefact's folder; None where there is none. Raises EnvironmentFault where it cannot be read."""
        path = folder / FILE
        try:
            content = read_json(path)
            if not isinstance(content, dict):
                raise ValueError("not a record of a stage")
            return TypeAdapter(cls).validate_python({"reads": [], "device": ""} | content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise EnvironmentFault(f"{path}: unreadable: {reason(error)}", f"delete {folder}, and make it again") from error

    def made_from(self, begun: Begun) -> bool:
        """Whether the artefact depends on what this progress depends on: the stage that had begun it has come to its end."""
        return all(name in self.inputs and self.inputs[name] == value for name, value in begun.inputs.items())


@dataclass(frozen=True)
class Begun:
    """What the progress of a stage that has not come to its end depends on, as in Record."""

    reads: list[str]
    inputs: dict[str, Any]

    def save(self, folder: Path) -> None:
        replace_text(folder / INPUTS, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Begun | None:
        """None where it is of no use: it does not say what it depends on."""
        try:
            return TypeAdapter(cls).validate_json((folder / INPUTS).read_bytes())
        except (OSError, ValidationError):
            return None


def has_state(progress: Path) -> bool:
    """Whether a progress folder holds something to go on from: tensors, or runs of steps."""
    return progress.is_dir() and any(path.suffix == ".safetensors" or path.is_dir() for path in progress.iterdir())


def values_of(recipe: Recipe, reads: list[str], content_of: Callable[[Path], str | None]) -> dict[str, Any]:
    """The values of recipe keys by flat name; of a path, and of a model's name, also what identifies its content."""
    flat = recipe.flat()
    values: dict[str, Any] = {}
    for read in reads:
        values |= {key: value for key, value in flat.items() if key == read or key.startswith(f"{read}.")}
        if isinstance(path := recipe.find(read), Path):
            values[f"{read} ({'file names' if path.is_dir() else 'content'})"] = content_of(path)
        if read.endswith(MODEL_NAME):
            values |= {f"{read} ({what})": value for what, value in model_content(str(recipe.find(read)), content_of).items()}
    return values


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names whose values differ, sorted; to be null is not to be left out, as the keys of a section are that is null."""
    left_out = object()
    return [key for key in sorted(old.keys() | new.keys()) if old.get(key, left_out) != new.get(key, left_out)]
