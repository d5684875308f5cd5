"""config.json of a model folder, and the same document among the metadata of exported files: one reader, one set of rules.

Keys that no rule names are allowed: later versions may write more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import read_json, reason
from lpvit_cli.recipe.model import Interpolation
from lpvit_cli.tokens.blocks import Merging

FORMAT = "lpvit-model"
LARGEST_IMAGE = 2**27  # numbers
LARGEST_ARGUMENT = 10**6  # in the kwargs of an architecture: a list of so many blocks is none
Pair = tuple[PositiveInt, PositiveInt]
Gives = Literal["logits", "pooled", "tokens"]


class _Part(BaseModel):
    """No numbers in quotes, no NaN."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Preprocessing(_Part):
    """How pixels become what the model takes, in timm's words."""

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # channels, height, width
    mean: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    interpolation: Interpolation | None = None
    crop_pct: Annotated[float, Field(ge=0.05, le=20)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    exif: bool | None = None
    label_names: list[str] | None = None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        channels, height, width = self.input_size or (0, 0, 0)
        if channels * height * width > LARGEST_IMAGE:
            raise ValueError(f"input_size: images of {channels} x {height} x {width} are too large")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values and channels and len(values) not in (1, channels):
                raise ValueError(f"{key}: {len(values)} values for {channels} channels")
        return self


PREPROCESSING = tuple(Preprocessing.model_fields)


class Remembered(_Part):
    """Where the validation images are, and how they are read."""

    dataset: str | None = None
    root: str | None = None
    split: str | None = None
    labels: Literal["auto", "none"] | None = None
    exif: bool | None = None


class SparseLayer(_Part):
    shape: Pair  # out, in
    block: Pair
    blocks: NonNegativeInt | None = None
    kept: NonNegativeInt | None = None


class Described(_Part):
    """What a model folder and an exported file say alike."""

    num_classes: NonNegativeInt | None = None
    gives: Gives | None = None  # files of lpvit 0.2 do not say
    preprocessing: Preprocessing
    data: Remembered | None = None

    @model_validator(mode="after")
    def _one_name_for_each_class(self) -> Self:
        names = self.preprocessing.label_names
        if names and self.num_classes and len(names) != self.num_classes:
            raise ValueError(f"preprocessing.label_names: {len(names)} names for {self.num_classes} classes")
        return self


class ModelConfig(Described):
    """config.json."""

    format: Literal["lpvit-model"]
    format_version: Literal[1] = 1
    family: Literal["timm", "transformers", "module"] = "timm"
    architecture: str
    kwargs: dict[str, Any]
    output: str | int | None = None
    widths: dict[str, PositiveInt] = {}
    sparsity: dict[str, SparseLayer]
    ordered: list[str] = []
    tokens: Merging | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # of model.safetensors; none in lpvit 0.2
    parent: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _arguments_of_an_architecture(self) -> Self:
        own = self.family == "module"  # which alone knows what its arguments mean
        if not own and not all(abs(number) <= LARGEST_ARGUMENT for number in numbers_in(self.kwargs)):
            raise ValueError(f"kwargs: a number above {LARGEST_ARGUMENT} is no size of an architecture")
        if own and (self.num_classes is None or self.gives is None):
            raise ValueError("num_classes and gives: nobody else knows them of a module of yours")
        return self


def numbers_in(value: Any) -> list[float]:
    """Every number in nested JSON."""
    if isinstance(value, dict | list):
        return [n for inner in (value.values() if isinstance(value, dict) else value) for n in numbers_in(inner)]
    return [value] if isinstance(value, int | float) else []


def require_valid(kind: type[BaseModel], content: Any) -> None:
    """Raise ValueError where JSON values break the rules of `kind`."""
    kind.model_validate_json(json.dumps(content))


def read_config(folder: Path) -> dict[str, Any]:
    """Raises UsageError where there is none, EnvironmentFault where it cannot be read or breaks a rule."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = read_json(path)
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError("not an lpvit model")
        require_valid(ModelConfig, config)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: no config.json there", "give a model folder, such as runs/NAME/pruned") from error
    except PermissionError as error:
        raise EnvironmentFault(f"{path}: {reason(error)}", "ask its owner for the right to read the folder") from error
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"{path}: unreadable: {reason(error)}", "make the model folder again with `lpvit run`"
        ) from error
    return config


def remembered_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """The data section of a config, without what it leaves open."""
    return {key: value for key, value in (config.get("data") or {}).items() if value is not None}
