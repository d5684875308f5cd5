"""What a bench measures, as report.json has it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.energy.run import EnergyRun, saving_verdict
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import TimingRun


class LayerBench(BaseModel):
    """A linear layer of the sparse model, timed within it."""

    name: str
    shape: tuple[int, int]  # out, in; smaller than the dense layer's where neurons or heads were cut out
    block: tuple[int, int] | None  # None: not block-sparse
    density: float
    rows: int  # of x in a call
    runs: str  # the backend of a block-sparse layer, or "linear"
    ms: float  # median
    ms_dense: float  # of the dense model's layer
    share: float  # of the sparse model's time
    tflops: float  # TFLOP/s on kept blocks
    roofline: float  # the least time that the device's ceilings allow over the measured one: 1 is as fast as it can be


class LayersBench(BaseModel):
    """Where the time of a batch goes; medians over passes with hooks, which the times of a batch are not."""

    total_ms: float  # of the sparse model
    total_ms_dense: float
    peak_tflops: float  # reached in a large product
    bandwidth_gb_s: float  # reached in a large copy
    layers: list[LayerBench]

    @property
    def rest_ms(self) -> float:
        """Outside of linear layers."""
        return max(0.0, self.total_ms - sum(layer.ms for layer in self.layers))

    @property
    def rest_ms_dense(self) -> float:
        return max(0.0, self.total_ms_dense - sum(layer.ms_dense for layer in self.layers))

    @property
    def rest_share(self) -> float:
        return self.rest_ms / self.total_ms


class BatchBench(BaseModel):
    """One batch size in one dtype. Ratios are baseline over subject: above 1 is faster, or uses less energy."""

    batch_size: int
    asked_batch_size: int  # larger, where that did not fit into memory
    dtype: str
    baseline: str  # the subject every ratio is against: the fastest dense one, or the one that bench.baseline names
    subject: str  # what the verdict is about: the fastest pruned one
    timing: TimingRun
    speedup: dict[str, Ratio]
    images_per_second: dict[str, float]
    peak_memory_bytes: dict[str, int | None]  # weights and what a call takes; None: not known for this kind of subject
    verdict: str
    energy: EnergyRun | None
    energy_reasons: list[str]
    work: dict[str, Work] = {}  # of a call; dense and sparse, eager and as graphs: what a compiler makes of them is not known
    layers: LayersBench | None = None  # None: not asked for

    @property
    def energy_verdict(self) -> str | None:
        """A sentence on the subject's energy; None: not measured."""
        if self.energy is None or not self.energy.subjects:
            return None
        ratio = self.energy.ratio(self.baseline, self.subject)
        return f"{self.title}: {saving_verdict(self.subject, self.baseline, self.energy, ratio)}"

    @property
    def title(self) -> str:
        return f"batch {self.batch_size}, {self.dtype}"


class Change(BaseModel):
    """A number of one subject in two reports. `ratio` is before over after: above 1 is better."""

    dtype: str
    batch_size: int
    subject: str
    what: Literal["ms", "J/image"]
    before: float
    after: float
    ratio: Ratio
    worse: bool  # beyond the interval and what dense moved by; pruned subjects only: the others tell how the machine changed


What = Literal["ms", "J/image"]
