"""What an export gives, as report.json has it."""

from __future__ import annotations

from pydantic import BaseModel, computed_field

from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import TimingRun
from lpvit_cli.tasks.quality import Accuracy, Quality


class Parity(BaseModel):
    batch_size: int
    relative_error: float
    agreement: float | None = None  # of logits: fraction of images with the same top-1
    agreement_but_ties: float | None = None  # the same, classes within the tolerance of the logits' norm counting as one: 1
    cosine: float | None = None  # of embeddings: mean over images
    flipped: float | None = None  # where tokens are merged: fraction of images in which the file merged others, near ties;
    # the error is then the median over images, and agreement_but_ties that of the other images

    @property
    def likeness(self) -> str:
        same = f"cosine {self.cosine:.6f}" if self.agreement is None else f"same top-1 for {self.agreement:.0%} of the images"
        return same if self.flipped is None else f"{same}, other tokens merged in {self.flipped:.0%}"


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
    quality: Quality | None = None
    layers: list[ExportedLayer] = []
    speed: ExportSpeed | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> Accuracy | None:
        return self.quality.accuracy if self.quality else None
