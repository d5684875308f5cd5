"""Batches of images for a model, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data.readers import Reader
from lpvit_cli.data.transforms import UNREADABLE, transform_for
from lpvit_cli.errors import EnvironmentFault, ForeignLabel
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.randomness import seeded
from lpvit_cli.recipe.data import DataSection

Batch = tuple[Tensor, Tensor]  # images [n, 3, H, W] float32, labels [n] int64


class _Guarded(Dataset):
    """Transformed images; an unreadable one becomes its file name instead of an exception in a worker. What a transform raises
    is a bug, and comes through.

    It is asked for an epoch and an index: workers live longer than an epoch. With a `seed`, what the transform draws depends on
    it, the epoch and the image only.
    """

    def __init__(self, reader: Reader, transform: Any, seed: int | None):
        self.reader, self.transform, self.seed = reader, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = item
        try:
            image, label = self._read(index)
        except UNREADABLE:
            return self.reader.filename(index)
        if self.seed is None:
            return self.transform(image), label
        with seeded(self.seed, epoch, index):
            return self.transform(image), label

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """Opened, decoded and in RGB: all that a damaged file can fail in."""
        image, label = self.reader[index]
        if isinstance(image, Image.Image):
            return image.convert("RGB"), label
        with image:
            return Image.open(image).convert("RGB"), label


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor, list[str]]:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return images, labels, [item for item in items if isinstance(item, str)]


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader:
    """Its workers stay; where this process computes on a GPU, batches lie in pinned memory, from where copies need not wait."""
    own = torch.Generator().manual_seed(0)  # workers are seeded of it: loading draws no random numbers of others
    pinned = torch.cuda.is_initialized()
    return DataLoader(dataset, num_workers=workers, persistent_workers=workers > 0, pin_memory=pinned, generator=own, **options)


@dataclass
class Batches:
    """Iterable over (images, labels). Unreadable images are skipped and listed in `skipped`; too many are an error.

    `limit` takes that many images: a random choice fixed by `seed` when shuffling, else the first ones. With several processes
    each gets its share of every batch. `augmented`: the transform draws random numbers. Workers start with the first pass and
    stay for later ones; a pass ends the one before it.
    """

    source: Reader | IterableDataset
    transform: Any
    batch_size: int  # of all processes together
    num_classes: int | None = None  # labels must be below; None: any
    workers: int = 0
    shuffle: bool = False
    augmented: bool = False
    seed: int = 0
    limit: int | None = None
    max_corrupt: float = 0.01
    skipped: list[str] = field(default_factory=list)
    _loader: DataLoader | None = field(default=None, init=False, repr=False, compare=False)
    _asked: list[list[tuple[int, int]]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def images(self) -> int | None:
        """How many images one pass of all processes asks for; None where the source does not know."""
        try:
            available = len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return self.limit
        return min(available, self.limit or available)

    @property
    def labelled(self) -> bool:
        from lpvit_cli.data.readers import is_labelled

        return is_labelled(self.source)

    def notes(self) -> list[str]:
        return []

    @property
    def share(self) -> int:
        """About how many images one pass of this process asks for; 0 where the source does not know."""
        return -(-(self.images or 0) // distributed.world())

    def __len__(self) -> int:
        return -(-(self.images or 0) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self.epoch(0) if len(batch[0]))

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """One pass, from batch `start` on; its order and images depend on seed and number only.

        Every process gets as many batches as the others. One is empty where a process has no readable image in it.
        """
        if isinstance(self.source, IterableDataset):
            yield from self._stream()
            return
        generator = np.random.RandomState((self.seed * 100_003 + number) % 2**32)
        indices = np.arange(len(self.source))
        if self.limit and self.shuffle:
            indices = np.random.RandomState(self.seed).permutation(indices)
        indices = indices[: self.limit]
        if self.shuffle:
            indices = generator.permutation(indices)
        rank, world = distributed.rank(), distributed.world()
        whole = [indices[at : at + self.batch_size] for at in range(0, len(indices), self.batch_size)][start:]
        shares = [[(number, index) for index in batch[rank::world].tolist()] for batch in whole]
        self._asked[:] = shares  # the loader's
        if self._loader is None:
            dataset = _Guarded(self.source, self.transform, self.seed if self.augmented else None)
            self._loader = _loader(dataset, self.workers, batch_sampler=self._asked, collate_fn=_collate)
        empty = start == 0 and (any(shares) or not shares)  # a share may be empty where others' are not
        for images, labels, unreadable in self._loader:
            self._count(unreadable, -(-len(indices) // world))
            self._require_known(labels)
            empty = empty and not len(images)
            yield images, labels
        if empty:
            raise EnvironmentFault("data: not one image could be read", "check data.root and the split")

    def _count(self, unreadable: list[str], total: int) -> None:
        self.skipped += [name for name in unreadable if name not in self.skipped]
        if unreadable and len(self.skipped) > self.max_corrupt * total:
            raise EnvironmentFault(
                f"data: {len(self.skipped)} of {total} images cannot be read so far, more than data.max_corrupt"
                f" (first: {self.skipped[0]})",
                "repair or remove them, or raise data.max_corrupt",
            )

    def _require_known(self, labels: Tensor) -> None:
        strange = [label for label in labels.tolist() if self.num_classes is not None and not 0 <= label < self.num_classes]
        if strange and self.num_classes:
            raise ForeignLabel(
                f"data: an image has label {strange[0]}, but the model has classes 0 to {self.num_classes - 1}",
                "use the data set the model was trained on, or a model with a head for these classes",
            )

    def _stream(self) -> Iterator[Batch]:
        self.source.transform = self.transform  # type: ignore[union-attr]
        rank, world = distributed.rank(), distributed.world()
        seen = 0
        if self._loader is None:
            self._loader = _loader(self.source, min(self.workers, 1), batch_size=self.batch_size)
        for images, labels in self._loader:
            images = images[: self.limit - seen] if self.limit else images
            labels = labels[: len(images)]
            self._require_known(labels)
            seen += len(images)
            yield images[rank::world], labels[rank::world]
            if self.limit and seen >= self.limit:
                return


def batches(model: VisionModel, source: Reader | IterableDataset, data: DataSection, **options: Any) -> Batches:
    """Batches of `source` as `model` wants them, with the recipe's batch size, workers and patience."""
    options.setdefault("transform", transform_for(model))
    options.setdefault("batch_size", data.peek("batch_size"))  # what is evaluated does not depend on it
    workers = data.peek("workers")
    return Batches(source, num_classes=model.num_classes, workers=workers, max_corrupt=data.max_corrupt, **options)


class ListedBatches:
    """Batches that lie in memory, as Batches gives them: in an order that depends on seed and epoch only."""

    def __init__(self, listed: list[Batch], seed: int):
        self.listed, self.seed = listed, seed
        self.batch_size = max(len(images) for images, _ in listed)

    def __len__(self) -> int:
        return len(self.listed)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        order = np.random.RandomState((self.seed * 100_003 + number) % 2**32).permutation(len(self.listed))
        return (self.listed[index] for index in order[start:])
