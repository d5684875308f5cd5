"""The quality of models on the validation images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lpvit_cli.data.batches import Batches
from lpvit_cli.devices import autocast
from lpvit_cli.errors import CheckFailed
from lpvit_cli.progress import Progress
from lpvit_cli.tasks.classification import Accuracy, accuracy

ROUNDING_POINTS, ROUNDING_IMAGES = 1.0, 3  # how far the accuracy of merged weights may be from that of separate ones


@dataclass(frozen=True)
class Validation:
    """Images, and where and in which compute type models are judged on them."""

    images: Batches
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    def accuracy(self, model: nn.Module, what: str) -> Accuracy:
        """Accuracy of `model`, which is left on the device in eval mode. `what` is what `progress` hears."""
        model.eval().to(self.device)
        total = self.images.share
        with torch.inference_mode(), autocast(self.device, self.dtype):
            return accuracy(
                lambda x: model(x.to(self.device, non_blocking=True)),
                self.images,
                lambda done: self.progress(what, done, total, f"{done}/{total} images"),
            )

    @property
    def skipped(self) -> list[str]:
        """Images that could not be read."""
        return self.images.skipped

    @property
    def notes(self) -> list[str]:
        return [f"{len(self.skipped)} unreadable images skipped (first: {self.skipped[0]})"] if self.skipped else []


def require_accuracy(written: Accuracy, best: Accuracy, epoch: int) -> None:
    """The model on disk, with its adapters merged, scores what the best epoch did: within the rounding of the merged weights,
    which may turn some images whose first two classes are nearly even."""
    allowed = ROUNDING_POINTS + 100 * ROUNDING_IMAGES / max(1, best.images)
    if abs(written.top1 - best.top1) > allowed:
        which = f"epoch {epoch}" if epoch else "the pruned model (epoch 0)"
        raise CheckFailed(
            f"the recovered model scores {written.top1:.2f} % as written, {which} scored {best.top1:.2f} %",
            "please report this as a bug",
        )
