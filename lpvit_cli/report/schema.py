"""What each stage reports: written as report.json beside its artefact, read back when the stage is skipped.

Units are in the names. `None` means not measured, with the reason beside it; never zero.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

from lpvit_cli.bench.results import BatchBench, Change
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.recovery.history import Epoch
from lpvit_cli.targets.tuning import TunedLayers
from lpvit_cli.tasks.quality import Accuracy, Quality
from lpvit_cli.tokens.blocks import Merging

DENSE = "dense"  # what sweeps and exported files are measured against


class Report(BaseModel):
    """`device` is the hardware the stage ran on; `notes` are sentences a user should read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    device: str
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _without_what_follows(cls, content: Any) -> Any:
        """Read back, computed fields are computed again."""
        computed = cls.model_computed_fields
        return {k: v for k, v in content.items() if k not in computed} if isinstance(content, dict) else content


class Evaluated(Report):
    """A model and how good it is; `accuracy` is null where there are no labels of classes."""

    quality: Quality

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> Accuracy | None:
        return self.quality.accuracy


class BesideDense(Evaluated):
    """The same of the dense model that it was made of."""

    quality_dense: Quality

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_dense(self) -> Accuracy | None:
        return self.quality_dense.accuracy


class CalibrateReport(Report):
    images: int
    gradient: str
    layers: int
    statistics_bytes: int
    merging: Merging | None = None  # of the tokens of the model that statistics are of


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


class MergedReport(BaseModel):
    """The model whose tokens are merged, before anything is pruned."""

    merging: Merging
    tokens: list[int]  # that each block sees, of one image
    flops: int
    quality: Quality
    quality_unmerged: Quality  # of the pruned model where it merges nothing


class PruneReport(BesideDense):
    """`quality` is one-shot: pruned, nothing recovered yet."""

    method: str
    beta: float
    layers: list[LayerReport]
    merged: MergedReport | None = None  # None: no tokens are merged
    flops_dense: int
    flops: int
    energy_uj_dense: float | None = None  # predicted, of the prunable layers; None: the sum over `layers`
    linear_kept_fraction: float  # of the prunable weights
    bytes_dense: int  # of the weights as one dense safetensors file
    bytes: int
    latency_ms_dense: float | None = None  # measured for the device profile; None: pruned without one
    latency_ms: float | None = None  # predicted from the profile
    skipped_images: int


class SweepPoint(BaseModel):
    budget: float
    folder: str
    report: PruneReport
    latency_ms: float  # median of a batch of target.batch_size, measured
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


class FinetuneReport(BesideDense):
    """`quality` is that of the best epoch, chosen on the validation images themselves; epoch 0 is the pruned model."""

    method: str
    rank: int | dict[str, int] | None  # None: no adapters
    trainable_parameters: int
    all_parameters: int
    optimizer_bytes: int
    processes: int
    quality_pruned: Quality
    best_epoch: int
    history: list[Epoch]
    skipped_images: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_pruned(self) -> Accuracy | None:
        return self.quality_pruned.accuracy


class GradualStep(BaseModel):
    budget: float
    folder: str  # of its model, within RUN/gradual
    pruned: PruneReport
    recovered: FinetuneReport


class GradualReport(Report):
    """Qualities called dense are those of the model that the first step began with."""

    kind: str  # what the budgets count
    steps: list[GradualStep]


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


class CompareReport(Report):
    before: str
    after: str
    differences: list[str]  # of devices and settings
    changes: list[Change]
    verdict: str


class ProfileReport(Report):
    profile: DeviceProfile


class TuneReport(Report):
    model: str
    dtype: str
    threads: int | None  # of the CPU
    tuned: list[TunedLayers]


class ExportReport(Report):
    model: str
    precision: str
    quality_model: Quality  # of the model that was exported
    files: list[ExportedFile]
    versions: dict[str, str | None]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_model(self) -> Accuracy | None:
        return self.quality_model.accuracy


class EvaluateReport(Evaluated):
    model: str
    dataset: str
    available: int | None = None  # images of the split, evaluated or not; None: a stream does not know
    reference: str | None = None  # what it is compared with
    skipped_images: int


class EmbedReport(Report):
    model: str
    output: str
    names: str | None  # the file that holds the images' names, where the output has no place for them
    shape: tuple[int, ...]  # of the embeddings: images, then features, or tokens and features
    images_per_second: float
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


if __name__ == "__main__":  # what docs/bench.schema.json holds
    print(json.dumps(BenchReport.model_json_schema(), indent=1))
