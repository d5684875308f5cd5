"""The dense model of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from lpvit_cli.recipe.section import Section, beside_the_recipe

TaskKind = Literal["auto", "classification", "features"]
FeaturesKind = Literal["pooled", "tokens"]
Channels = Annotated[tuple[float, ...], Field(min_length=1)]


class Preprocess(Section):
    """What differs from the model's own preprocessing (timm's pretrained_cfg). Pixels are in 0..1 before mean and std."""

    mean: Channels | None = None  # of each channel, or one for all
    std: Channels | None = None  # of each channel, or one for all
    crop_pct: float | None = Field(default=None, gt=0, le=1)  # the share of the resized image that the centre crop keeps
    interpolation: Literal["bicubic", "bilinear", "nearest"] | None = None  # of resizing


class ModelSection(Section):
    """The dense model: a timm name (or `hf-hub:owner/name`), its constructor arguments, and where its weights come from."""

    name: str  # as `timm.create_model` takes it
    pretrained: bool = False  # with the weights that timm downloads
    weights: Path | None = None  # a safetensors file, named as in timm
    kwargs: dict[str, Any] = Field(default_factory=dict)  # of the constructor: num_classes, img_size ...
    output: str | int | None = None  # which one, of a model that gives several: its name or position
    preprocess: Preprocess = Field(default_factory=Preprocess)  # default: the model's own

    @field_validator("weights")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return beside_the_recipe(path, info)

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.pretrained and self.weights:
            raise ValueError("give either pretrained: true or weights: FILE, not both")
        return self
