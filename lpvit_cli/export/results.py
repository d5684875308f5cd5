"""What an export gives, as report.json has it."""

from __future__ import annotations

from pydantic import BaseModel

from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import TimingRun
from lpvit_cli.tasks.classification import Accuracy


class Parity(BaseModel):
    batch_size: int
    relative_error: float
    agreement: float  # fraction of images with the same top-1
    agreement_but_ties: float  # the same, classes within the tolerance of the logits' norm counting as one: what must be 1


class ExportedLayer(BaseModel):
    """How a linear layer is written; `times_us`: medians by form, of this layer or of one just like it; empty: not timed."""

    name: str
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    density: float
    form: str
    times_us: dict[str, float]


class ExportSpeed(BaseModel):
    """The file against the dense model in float32, both in the runtime that the file is for."""

    threads: int
    batch_size: int
    timing: TimingRun
    speedup: Ratio
    verdict: str


class ExportedFile(BaseModel):
    format: str
    file: str  # within RUN/export
    bytes: int
    bytes_dense: int | None = None  # of the same kind of file, dense and float32
    parity: list[Parity] = []
    accuracy: Accuracy | None = None
    layers: list[ExportedLayer] = []
    speed: ExportSpeed | None = None
