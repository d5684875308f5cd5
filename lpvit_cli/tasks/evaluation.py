"""The quality of models on the validation images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.data.batches import Batches
from lpvit_cli.data.readers import require_same_classes
from lpvit_cli.data.splits import gallery_batches, validation_batches
from lpvit_cli.devices import autocast
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.data import CalibrateSection, DataSection
from lpvit_cli.tasks.base import Task
from lpvit_cli.tasks.classification import Classification
from lpvit_cli.tasks.features import Features
from lpvit_cli.tasks.neighbours import embedding_of, knn_top1
from lpvit_cli.tasks.quality import Quality

ROUNDING_POINTS, ROUNDING_IMAGES = 1.0, 3  # how far merged weights may be from separate ones
REMEMBERED_BYTES = 2**30  # of the dense model's outputs; more are made again each time


def task_of(model: VisionModel) -> Task:
    """What a model is judged by: a head tells classes apart, without one it gives features."""
    return Classification() if model.num_classes else Features()


@dataclass
class Validation:
    """Images, and where and in which compute type models are judged on them.

    `dense`: the model that others are compared with; None: by labels alone. `gallery`: labelled images among which
    embeddings look for their neighbours; None: they do not.
    """

    images: Batches
    device: torch.device
    dtype: torch.dtype
    progress: Progress
    task: Task
    dense: nn.Module | None = None
    gallery: Batches | None = None
    _remembered: list[Tensor] = field(default_factory=list, repr=False)

    def quality(self, model: nn.Module, what: str, neighbours: bool = True) -> Any:
        """The quality of `model`, which is left on the device in eval mode. `what` is what `progress` hears; `neighbours`:
        with k-NN, where there is a gallery."""
        score, total, done = self.task.score(), self.images.share, 0
        ours: list[tuple[Tensor, Tensor]] = []
        wanted = neighbours and self.gallery is not None
        for number, (images, labels) in enumerate(self.images):
            reference = self._reference(number, images)
            outputs = reference if model is self.dense and reference is not None else self._outputs(model, images)
            score.add(outputs, reference, labels)
            if wanted:
                ours.append((embedding_of(outputs), labels))
            done += len(images)
            self.progress(what, done, total, f"{done}/{total} images")
        quality = score.quality()
        return replace(quality, **self._neighbours(model, ours, what)) if wanted else quality

    def _outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        model.eval().to(self.device)
        with torch.inference_mode(), autocast(self.device, self.dtype):
            outputs: Tensor = model(images.to(self.device, non_blocking=True))
            return outputs.float().cpu()

    def _reference(self, number: int, images: Tensor) -> Tensor | None:
        """What the dense model says of the batch of this number: the same in every pass."""
        if self.dense is None:
            return None
        if number < len(self._remembered):
            return self._remembered[number]
        outputs = self._outputs(self.dense, images)
        if number * outputs.nbytes < REMEMBERED_BYTES:
            self._remembered.append(outputs)
        return outputs

    def _neighbours(self, model: nn.Module, ours: list[tuple[Tensor, Tensor]], what: str) -> dict[str, float]:
        theirs = list(self._embeddings(model, f"{what}: neighbours"))
        queries, labels = _together(ours)
        return {f"knn{k}": value for k, value in knn_top1(queries, labels, *_together(theirs)).items()}

    def _embeddings(self, model: nn.Module, what: str) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.gallery is not None
        done, total = 0, self.gallery.share
        for images, labels in self.gallery:
            yield embedding_of(self._outputs(model, images)), labels
            done += len(images)
            self.progress(what, done, total, f"{done}/{total} images")


def validation_of(
    data: DataSection,
    calibrate: CalibrateSection,
    model: VisionModel,
    dense: nn.Module | None,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Validation:
    """How `model`, and what is made of it, are judged on the validation images; beside `dense`, where that is given."""
    images, task = validation_batches(data, model), task_of(model)
    gallery = gallery_batches(data, calibrate, model) if task.needs_dense and images.labelled else None
    if gallery is not None:
        try:
            require_same_classes(gallery.source, images.source)
        except UsageError as error:  # embeddings need no classes
            gallery = None
            images.more_notes.append(f"no k-NN: {error.message.removeprefix('data: ')}")
    return Validation(images, device, dtype, progress, task, dense, gallery)


def gradient_for(task: Task, calibrate: CalibrateSection, images: Batches) -> str:
    """The kind of loss that statistics are of; empty where the task knows one only."""
    if not task.uses_gradient:
        return ""
    if calibrate.gradient == "empirical" and not images.labelled:
        raise UsageError(
            "calibrate.gradient: empirical needs labels, and these images have none",
            "--set calibrate.gradient=sampled, or give one folder for each class",
        )
    return calibrate.gradient


def _together(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Embeddings [n, d] and labels [n] of all processes."""
    every = distributed.all_gather(batches)
    return torch.cat([one for one, _ in every]), torch.cat([labels for _, labels in every])


def require_same_quality(written: Quality, best: Quality, epoch: int) -> None:
    """The model on disk, with its adapters merged, is as good as the best epoch was: within the rounding of the merged weights,
    which may turn some images whose first two classes are nearly even."""
    allowed = ROUNDING_POINTS + ROUNDING_IMAGES * best.step
    if abs(written.score[0] - best.score[0]) > allowed:
        which = f"epoch {epoch}" if epoch else "the pruned model (epoch 0)"
        now, before = written.figures[0], best.figures[0]
        raise CheckFailed(
            f"the recovered model scores {now.text} as written, {which} scored {before.text} ({before.name})",
            "please report this as a bug",
        )
