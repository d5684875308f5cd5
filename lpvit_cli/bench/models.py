"""Several models side by side, on one batch of images."""

from __future__ import annotations

from torch import Tensor

from lpvit_cli.bench.subjects import forward_of
from lpvit_cli.measure.timing import TimingRun, cpu_threads, time_interleaved
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.trim import trim
from lpvit_cli.progress import Progress
from lpvit_cli.sparse import freeze, fuse
from lpvit_cli.targets.tuning import tune_model


def time_models(
    models: dict[str, VisionModel],
    dense: str,
    images: Tensor,
    *,
    threads: int | None,
    rounds: int,
    warmup_seconds: float,
    progress: Progress,
) -> TimingRun:
    """All models interleaved on images [n, C, H, W], on their device and in their type; all but `dense` tuned and frozen."""
    with cpu_threads(threads):
        ready = {name: model if name == dense else fuse(trim(model)) for name, model in models.items()}
        for name, model in ready.items():
            model.to(images.device, images.dtype)
            if name != dense:
                tune_model(model, [len(images)], ("forward",), progress, again=False)
        return time_interleaved(
            {name: forward_of(freeze(model, images), images) for name, model in ready.items()},
            device=images.device,
            rounds=rounds,
            warmup_seconds=warmup_seconds,
            on_round=lambda done, total: progress("timing the models", done, total, f"round {done}/{total}"),
        )
