"""The calibration and the validation images of a recipe."""

from __future__ import annotations

from torch.utils.data import IterableDataset

from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.readers import is_labelled, open_images
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.data import CalibrateSection, DataSection

HELD_BACK = 64  # images to choose by, at least


def calibration_batches(data: DataSection, settings: CalibrateSection, seed: int, model: VisionModel) -> Batches:
    """The same images every time, for the same sections and seed."""
    source = open_images(data, data.train_split, model)
    size = settings.peek("batch_size")
    return batches(model, source, data, batch_size=size, shuffle=True, seed=seed, limit=settings.images)


def held_back_batches(data: DataSection, settings: CalibrateSection, seed: int, model: VisionModel) -> Batches | None:
    """More training images, that calibration does not see, to choose by; None where there are none."""
    source = open_images(data, data.train_split, model)
    if isinstance(source, IterableDataset) or len(source) <= settings.images:
        return None
    size, count = settings.peek("batch_size"), max(HELD_BACK, settings.images // 8)
    return batches(model, source, data, batch_size=size, seed=seed, limit=count, skip=settings.images, max_corrupt=1.0)


def gallery_batches(data: DataSection, settings: CalibrateSection, model: VisionModel) -> Batches | None:
    """Labelled training images, as many as calibrate, among which embeddings look for their neighbours; None: no classes."""
    source = open_images(data, data.train_split, model)
    return batches(model, source, data, limit=settings.images) if is_labelled(source) else None


def validation_batches(data: DataSection, model: VisionModel) -> Batches:
    source = open_images(data, data.val_split, model)
    return batches(model, source, data, limit=data.val_images)
