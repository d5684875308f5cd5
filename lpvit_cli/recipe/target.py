"""Where the model will run."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from lpvit_cli.recipe.section import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
FilePrecision = Literal["float32", "float16", "bfloat16", "int8", "int8-static"]
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int8-static")  # of files


class TargetSection(Section):
    """Where the model will run: profile, prune --sweep, bench, tune and export measure and choose for this; prune follows the
    profile. `precision` is of compute, and of files for a runtime that reads files (int8 of files only); auto is the recipe's
    `dtype`, and float32 for files. `device` auto is the recipe's `device`."""

    runtime: Literal["torch", "onnxruntime"] = "torch"  # what bench compares in; profile knows torch only
    precision: Literal["auto", "float32", "float16", "bfloat16", "int8", "int8-static"] = "auto"
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    threads: PositiveInt | None = None  # CPU threads; None: torch's default, and all cores for files
    batch_size: PositiveInt = 1  # images in a call, of profile and of files; bench has batch_sizes

    @model_validator(mode="after")
    def _int8_is_of_files(self) -> Self:
        if self.runtime == "torch" and self.precision.startswith("int8"):
            raise ValueError(
                f"precision: {self.precision} needs runtime: onnxruntime; for exported files alone set export.precision"
            )
        return self
