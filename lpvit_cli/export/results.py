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


class FreeForm(BaseModel):
    """The dense model in a form that needs no pruning, timed beside the file."""

    name: str
    subject: str  # in the timing
    median_ms: float
    speedup: Ratio  # of the file over it
    quality: Quality | None = None  # None: not evaluated, as it is slower than another; or not known
    counts: bool = True  # False: it loses more than export.max_drop, and is no alternative


class ExportSpeed(BaseModel):
    """The file against the dense model in float32 in the runtime that the file is for (`speedup`), and against the fastest form
    of the dense model that keeps its quality. None, or empty: a report of an earlier version."""

    threads: int
    batch_size: int
    timing: TimingRun
    speedup: Ratio
    free: list[FreeForm] = []
    best_free: str | None = None
    speedup_over_best_free: Ratio | None = None
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
