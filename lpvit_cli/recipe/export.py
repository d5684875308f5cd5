"""What `lpvit export` writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lpvit_cli.recipe.section import Section
from lpvit_cli.recipe.target import FilePrecision
from lpvit_cli.registry import FORMATS


class ExportSection(Section):
    """What `lpvit export` writes. `form`: how block-sparse layers are written; auto times the forms in onnxruntime (for pt2 and
    aoti in torch) with the target's threads and batch size, and takes the fastest. int8 finds the range of each activation as
    it runs, int8-static has it from the calibration images. `tolerance` bounds ||file - model|| / ||model|| of the outputs,
    `max_drop` the points of the task's metric lost."""

    formats: Annotated[tuple[Annotated[str, AfterValidator(FORMATS.require)], ...], Field(min_length=1)] = ("onnx",)  # files
    form: Literal["auto", "dense", "rows", "chain", "batched"] = "auto"
    precision: FilePrecision | None = None  # None: the target's, float32 where that says auto or is torch's
    opset: int = Field(default=20, ge=20)  # of ONNX
    tolerance: float | None = Field(default=None, gt=0)  # None: by precision
    max_drop: float = Field(default=1.0, ge=0, le=100)
