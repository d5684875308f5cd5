"""What bench and profile measure, and how long."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from lpvit_cli.recipe.section import Section, beside_the_recipe
from lpvit_cli.recipe.target import Dtype

SubjectName = Literal[
    "dense",
    "dense-compiled",
    "dense-graph",
    "dense-compiled-graph",
    "dense-onnx",
    "dense-onnx-int8",
    "merged-dense",
    "unmerged-sparse",
    "masked-dense",
    "masked-dense-compiled",
    "masked-dense-graph",
    "masked-dense-compiled-graph",
    "sparse",
    "sparse-compiled",
    "sparse-graph",
    "sparse-compiled-graph",
    "onnx",
]
DENSE, PRUNED = "dense", ("sparse", "onnx")  # what the names of bench's subjects begin with; others explain the difference
SUBJECTS: dict[str, tuple[SubjectName, ...]] = {
    "torch": ("dense", "masked-dense", "sparse"),
    "onnxruntime": ("dense-onnx", "dense-onnx-int8", "onnx"),
}
OF_MERGING: tuple[SubjectName, ...] = ("merged-dense", "unmerged-sparse")  # what each of both saves


class EnergySection(Section):
    """Windows of steady load between two readings of a power meter."""

    window_seconds: float = Field(default=10.0, gt=0)  # at least; a slow counter makes it longer
    trials: int = Field(default=6, ge=6)  # windows of each subject
    required: bool = False  # exit code 3 where energy could not be measured; the times are kept
    allow_mig: bool = False  # on a GPU split by MIG, whose power is that of all its users


class BenchSection(Section):
    """What is compared, in turn in one process. `subjects`: the dense model, masked-dense (the same zeros in dense layers), and
    sparse; where tokens are merged also merged-dense, which has all weights, and unmerged-sparse, which has all tokens; in
    eager PyTorch (on a GPU also as CUDA graphs), -compiled by torch.compile, or as a CUDA -graph; onnx is the file of
    `lpvit export`, dense-onnx the dense model in onnxruntime, dense-onnx-int8 the same in dynamic int8. Ratios are against the
    fastest dense one, or `baseline`."""

    subjects: tuple[SubjectName, ...] = ()  # none: dense, masked-dense and sparse, and the two of merging; for onnxruntime
    # dense-onnx, dense-onnx-int8 and onnx
    baseline: Path | None = None  # another run folder, model folder or ONNX file
    batch_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)  # each is compared
    dtypes: tuple[Dtype, ...] = ()  # none: the target's precision
    rounds: int = Field(default=30, ge=6)  # in each, every subject has a turn
    warmup_seconds: float = Field(default=2.0, ge=0)  # of each subject, not counted
    layers: bool = False  # time every linear layer within the model
    energy: EnergySection = EnergySection()  # joules, where a meter can be read

    @field_validator("baseline")
    @classmethod
    def _beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return beside_the_recipe(path, info)

    @field_validator("subjects", "batch_sizes", "dtypes")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _has_two_sides(self) -> Self:
        if not self.subjects:
            return self
        if not any(name.startswith(PRUNED) for name in self.subjects):
            raise ValueError("subjects: needs a pruned one to compare: sparse, sparse-compiled, sparse-graph, or onnx")
        if self.baseline is None and not any(name.startswith(DENSE) for name in self.subjects):
            raise ValueError("subjects: needs a dense one to compare with, or a baseline")
        return self


class ProfileSection(Section):
    """Layers one by one, dense and block-sparse, for `lpvit profile`; where they run is the target's, energy windows are
    bench's."""

    rounds: int = Field(default=30, ge=6)  # timings of each layer
