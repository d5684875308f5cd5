"""A recovery from start to end: adapters, where they start, what is trained, the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lpvit_kernels import tuned

from lpvit_cli import distributed
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery.lora import adapt
from lpvit_cli.recovery.start import choose_trained, ranks_of, start_from_gradient
from lpvit_cli.recovery.trainer import Evaluate, Judged, Trainer

Precision = Callable[[], AbstractContextManager[object]]


def recover(
    model: Any,
    settings: FinetuneSection,
    train: Any,
    plain: Any,
    objective: Any,
    evaluate: Evaluate,
    before: Judged,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    folder: Path | None = None,
    precision: Precision = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> tuple[Trainer, int]:
    """Train `model` in place; it ends as the best of its epochs, epoch 0 (of quality `before`) included, its adapters on it.

    `train`, `plain`: batches, augmented or not (as Batches). `folder`: where progress is kept, and taken up again; None: none
    is. Returns the trainer, and how many steps had been done before.
    """
    ranks = ranks_of(model, settings)
    with _same_choices(folder):
        begun = distributed.broadcast(folder is not None and (folder / "checkpoint.safetensors").is_file())
        if settings.method == "lora_ga" and not begun:
            exact = nullcontext if dtype == torch.float16 else precision  # small gradients would be zero in float16
            start_from_gradient(model, ranks, settings, plain, objective, exact, device, progress)
        else:
            adapt(model, ranks, settings.alpha)
        del plain  # its workers end
        choose_trained(model, settings)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        trainer = Trainer(model, settings, train, objective, evaluate, before, folder, seed, device, precision, scaler)
        resumed = trainer.resume()
        trainer.fit(lambda done, total, detail: progress("recovering", done, total, detail))
    return trainer, resumed


@contextmanager
def _same_choices(folder: Path | None) -> Iterator[None]:
    """Tuning between a kill and going on must not change how sums are rounded: the tuned table is kept with the progress."""
    if folder is None:
        yield
        return
    table = folder / "tuned.json"
    if distributed.is_main():
        tuned.keep(table)
    distributed.broadcast(None)
    with tuned.using(table):
        yield
