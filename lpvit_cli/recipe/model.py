"""The dense model of a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from lpvit_cli.recipe.code import allow_code
from lpvit_cli.recipe.section import Section, absolute, beside_the_recipe

TRANSFORMERS, MODULE = "transformers:", "module:"  # how names of these families begin
TaskKind = Literal["auto", "classification", "features"]
FeaturesKind = Literal["pooled", "tokens"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "hamming", "box"]
Channels = Annotated[tuple[float, ...], Field(min_length=1)]


class Preprocess(Section):
    """What differs from the model's own preprocessing (timm's pretrained_cfg). Pixels are in 0..1 before mean and std."""

    input_size: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # channels, height, width; module: models need it
    mean: Channels | None = None  # of each channel, or one for all
    std: Channels | None = None  # of each channel, or one for all
    crop_pct: float | None = Field(default=None, gt=0, le=1)  # the share of the resized image that the centre crop keeps
    crop_mode: Literal["center", "squash", "border"] | None = None  # how an image becomes a square: cut, squeezed or padded
    interpolation: Interpolation | None = None  # of resizing


class ModelSection(Section):
    """The dense model: a timm name (or `hf-hub:owner/name`), a Hugging Face one (`transformers:owner/name`), or your own
    (`module:package.module:function`, whose code runs); its arguments, and where its weights come from. See models.md."""

    name: str  # NAME, hf-hub:OWNER/NAME, transformers:OWNER/NAME, transformers:FOLDER or module:PACKAGE.MODULE:FUNCTION
    pretrained: bool = False  # with the weights of the hub or the folder
    weights: Path | None = None  # a safetensors file, its tensors named as in the family's own checkpoints
    kwargs: dict[str, Any] = Field(
        default_factory=dict
    )  # of the constructor (num_classes, img_size ...); transformers: its config
    output: str | int | None = None  # which one, of a model that gives several: its name or position
    label_names: tuple[str, ...] | None = None  # names of the classes in label order; null: the model's own
    preprocess: Preprocess = Field(default_factory=Preprocess)  # default: the model's own

    @field_validator("name")
    @classmethod
    def _of_the_recipe(cls, name: str, info: ValidationInfo) -> str:
        if name.startswith(TRANSFORMERS):
            return model_at(name, info.context["folder"] if info.context else Path())
        if name.startswith(MODULE) and info.context:
            allow_code(name.removeprefix(MODULE), info.context["folder"])
        return name

    @field_validator("weights")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return beside_the_recipe(path, info)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained: true or weights: FILE, not both")
        return self


def model_at(name: str, base: Path) -> str:
    """`transformers:FOLDER` with the whole path; a relative one counts from `base`. Any other name is as it was."""
    if not name.startswith(TRANSFORMERS):
        return name
    given = name.removeprefix(TRANSFORMERS)
    if given.startswith(("/", "./", "../", "~")) or os.path.isfile(base / given / "config.json"):
        return TRANSFORMERS + str(absolute(Path(given), base))
    return name
