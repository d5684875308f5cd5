"""What each stage reports: written as report.json beside its artefact, read back when the stage is skipped.

Units are in the names. `None` means not measured, with the reason beside it; never zero.
"""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.measure.energy import EnergyRun, saving_verdict
from lpvit_cli.measure.power import Work
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import TimingRun

BASELINE = "dense"  # what sweeps and exported files are measured against


class Report(BaseModel):
    """`device` is the hardware the stage ran on; `notes` are sentences a user should read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    device: str
    notes: list[str] = []


class CalibrateReport(Report):
    images: int
    gradient: str
    layers: int
    statistics_bytes: int


class LayerReport(BaseModel):
    """One pruned layer."""

    name: str
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    blocks: int
    kept_blocks: int
    kept_map: list[str]  # one string per block row, '#' kept, '.' removed
    distortion: float  # units of the method's score; per-image loss for taylor and lpvit
    flops_dense: int
    flops: int
    energy_uj_dense: float  # predicted, not measured
    energy_uj: float

    @property
    def kept_fraction(self) -> float:
        return self.kept_blocks / self.blocks


class PruneReport(Report):
    method: str
    beta: float
    layers: list[LayerReport]
    flops_dense: int
    flops: int
    linear_kept_fraction: float  # of the prunable weights
    bytes_dense: int  # of the weights as one dense safetensors file
    bytes: int
    latency_ms_dense: float | None = None  # measured for the device profile; None: pruned without one
    latency_ms: float | None = None  # predicted from the profile
    accuracy_dense: Accuracy
    accuracy: Accuracy  # one-shot: pruned, nothing recovered yet
    skipped_images: int


class SweepPoint(BaseModel):
    budget: float
    folder: str
    report: PruneReport
    latency_ms: float  # median of a batch of profile.batch_size, measured
    speedup: Ratio  # dense latency over this one's


class SweepReport(Report):
    kind: str  # what the budgets count: flops, sparsity, latency_ms, energy_mj or max_drop
    batch_size: int  # of the latencies
    latency_ms_dense: float
    points: list[SweepPoint]


class PredictedPoint(BaseModel):
    """What a budget would give; nothing was pruned. Energy by the recipe's power model, latency from a device profile."""

    budget: float
    kept_fraction: float  # of the prunable weights
    kept_by_layer: dict[str, float]
    flops: int
    bytes: int
    energy_uj: float
    latency_ms: float | None


class PredictionReport(Report):
    """A dry run of prune. `reasons`: why there is no prediction, or none of the latency."""

    kind: str
    flops_dense: int = 0
    bytes_dense: int = 0
    energy_uj_dense: float = 0.0
    latency_ms_dense: float | None = None
    points: list[PredictedPoint]
    reasons: list[str] = []


class Epoch(BaseModel):
    """Loss and accuracy while training, and the accuracy on the validation images after it."""

    epoch: int
    loss: float
    top1: float
    validation_top1: float
    images_per_second: float


class FinetuneReport(Report):
    """`accuracy` is that of the best epoch, chosen on the validation images themselves; epoch 0 is the pruned model."""

    method: str
    rank: int | dict[str, int] | None  # None: no adapters
    trainable_parameters: int
    all_parameters: int
    optimizer_bytes: int
    processes: int
    accuracy_dense: Accuracy
    accuracy_pruned: Accuracy
    accuracy: Accuracy
    best_epoch: int
    history: list[Epoch]
    skipped_images: int


class GradualStep(BaseModel):
    budget: float
    folder: str  # of its model, within RUN/gradual
    pruned: PruneReport
    recovered: FinetuneReport


class GradualReport(Report):
    """Accuracies called dense are those of the model that the first step began with."""

    kind: str  # what the budgets count
    steps: list[GradualStep]


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
    """One batch size in one dtype. Ratios are baseline over subject: above 1 is faster (or thriftier)."""

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


class BenchReport(Report):
    """docs/bench.schema.json is its JSON schema. Version 2: several dtypes, any subjects, memory, layers."""

    schema_version: Literal[2] = 2
    model: str  # which artefact was measured: pruned or finetuned
    threads: int
    machine: dict[str, str | int | None]
    versions: dict[str, str | None]
    flops_dense: int
    flops: int
    batches: list[BatchBench]

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(batch.dtype for batch in self.batches))

    @property
    def energy_reasons(self) -> list[str]:
        """Why energy was not measured, each reason once."""
        return list(dict.fromkeys(reason for batch in self.batches for reason in batch.energy_reasons))


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


class CompareReport(Report):
    before: str
    after: str
    differences: list[str]  # of devices and settings
    changes: list[Change]
    verdict: str


class ProfileReport(Report):
    profile: DeviceProfile


class TunedLayers(BaseModel):
    """Layers that no choice of a backend can tell apart. Times are medians in microseconds, by backend."""

    layers: list[str]
    kind: str  # forward, input_gradient or weight_gradient
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    density: float
    tokens: int
    choice: str
    times_us: dict[str, float]
    speedup: float | None  # dense time over the choice's; None: there is no dense form
    kept_tflops: float  # TFLOP/s on kept blocks


class TuneReport(Report):
    model: str
    dtype: str
    threads: int | None  # of the CPU
    tuned: list[TunedLayers]


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


class ExportReport(Report):
    model: str
    precision: str
    accuracy_model: Accuracy  # of the model that was exported
    files: list[ExportedFile]
    versions: dict[str, str | None]


class EvaluateReport(Report):
    model: str
    dataset: str
    accuracy: Accuracy
    skipped_images: int


class Prediction(BaseModel):
    """The likeliest classes of one image, most likely first."""

    image: str
    classes: list[int]
    names: list[str] | None
    probabilities: list[float]


class PredictReport(Report):
    model: str
    predictions: list[Prediction]


REPORTS: dict[str, type[Report]] = {
    "calibrate": CalibrateReport,
    "prune": PruneReport,
    "sweep": SweepReport,
    "finetune-lora-ga": FinetuneReport,
    "gradual": GradualReport,
    "bench": BenchReport,
    "profile": ProfileReport,
    "export": ExportReport,
}

if __name__ == "__main__":  # what docs/bench.schema.json holds
    print(json.dumps(BenchReport.model_json_schema(), indent=1))
