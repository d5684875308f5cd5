"""Batches of images for a model, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lpvit_cli import distributed
from lpvit_cli.data.pixels import UNREADABLE, ModelImage, read_picture
from lpvit_cli.data.readers import Reader, is_labelled
from lpvit_cli.data.transforms import channels_of, transform_for, turns
from lpvit_cli.errors import EnvironmentFault, ForeignImage, LpvitError, known
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.randomness import seeded
from lpvit_cli.recipe.data import DataSection

Batch = tuple[Tensor, Tensor]  # images [n, C, H, W] float32, labels [n] int64, -1 where there are none
SILENCE = 120  # seconds that workers may take for a batch; one that finds no shared memory says nothing for ever
Item = tuple[Tensor, int] | str | LpvitError  # an image, the name of an unreadable one, or what stops the command


@dataclass(frozen=True)
class Prepare:
    """What is done to an image before it is one of a batch."""

    transform: Any
    channels: int
    exif: bool

    def read(self, source: Any) -> ModelImage:
        return read_picture(source, self.channels, self.exif)


class _Guarded(Dataset):
    """Transformed images; an unreadable one becomes its file name, and an error of the user's an item, instead of an exception
    in a worker. What a transform raises is a bug, and comes through.

    It is asked for an epoch and an index: workers live longer than an epoch. With a `seed`, what the transform draws depends on
    it, the epoch and the image only.
    """

    def __init__(self, reader: Reader, prepare: Prepare, seed: int | None):
        self.reader, self.prepare, self.seed = reader, prepare, seed

    def __getitem__(self, item: tuple[int, int]) -> Item:
        epoch, index = item
        try:
            source, label = self.reader[index]
            image = self.prepare.read(source)
        except ForeignImage as error:
            return ForeignImage(f"data: {self.reader.filename(index)} {error.message}", error.hint)
        except LpvitError as error:
            return error
        except UNREADABLE:
            return self.reader.filename(index)
        if self.seed is None:
            return self.prepare.transform(image), label
        with seeded(self.seed, epoch, index):
            return self.prepare.transform(image), label


class _Streamed(IterableDataset):
    """As _Guarded, of images that come one after the other."""

    def __init__(self, source: IterableDataset, prepare: Prepare):
        self.source, self.prepare = source, prepare

    def __iter__(self) -> Iterator[Item]:
        try:
            for number, (source, label) in enumerate(self.source):
                try:
                    image = self.prepare.read(source)
                except ForeignImage as error:
                    raise ForeignImage(f"data: image {number} {error.message}", error.hint) from error
                except UNREADABLE:
                    yield f"image {number}"
                else:
                    yield self.prepare.transform(image), label
        except LpvitError as error:
            yield error


def _collate(items: list[Item]) -> tuple[Tensor, Tensor, list[str]] | LpvitError:
    good = [item for item in items if isinstance(item, tuple)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    error = next((item for item in items if isinstance(item, LpvitError)), None)
    return error or (images, labels, [item for item in items if isinstance(item, str)])


def _loader(dataset: Any, workers: int, **options: Any) -> DataLoader:
    """Its workers stay; where this process computes on a GPU, batches lie in pinned memory, from where copies need not wait."""
    own = torch.Generator().manual_seed(0)  # workers are seeded of it: loading draws no random numbers of others
    pinned = torch.cuda.is_initialized()
    if workers:
        options |= {"num_workers": workers, "persistent_workers": True, "timeout": distributed.patience(SILENCE)}
    return DataLoader(dataset, pin_memory=pinned, generator=own, **options)


@dataclass
class Batches:
    """Iterable over (images, labels). Unreadable images are skipped and listed in `skipped`; too many are an error.

    `limit` takes that many images, a random choice fixed by `seed`: in sorted order unless shuffling; of a stream the first
    ones. With several processes each gets its share of every batch. `augmented`: the transform draws random numbers. Workers
    start with the first pass and stay for later ones; a pass ends the one before it. Images without labels have label -1.
    """

    source: Reader | IterableDataset
    transform: Any
    batch_size: int  # of all processes together
    num_classes: int | None = None  # labels must be below; None, 0: any
    workers: int = 0
    shuffle: bool = False
    augmented: bool = False
    seed: int = 0
    limit: int | None = None
    skip: int = 0  # of that random choice, the images before the first
    max_corrupt: float = 0.01
    channels: int = 3  # as the model takes them
    exif: bool = False  # turn images as their orientation tag says
    skipped: list[str] = field(default_factory=list)
    more_notes: list[str] = field(default_factory=list)  # beside those of the source
    _loader: DataLoader | None = field(default=None, init=False, repr=False, compare=False)
    _asked: list[list[tuple[int, int]]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def available(self) -> int | None:
        """How many images the source has; None where it does not know."""
        try:
            return len(self.source) or None  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def images(self) -> int | None:
        """How many images one pass of all processes asks for; None where the source does not know."""
        available = max(0, self.available - self.skip) if self.available else None
        return min(available or self.limit or 0, self.limit or available or 0) or None

    @property
    def labelled(self) -> bool:
        return is_labelled(self.source)

    def notes(self, skipped: list[str] | None = None) -> list[str]:
        """What a user should know of these images, in sentences; `skipped`: of all processes."""
        notes = [*getattr(self.source, "notes", ()), *self.more_notes]
        skipped = self.skipped if skipped is None else skipped
        if self.images and self.available and self.images < self.available:
            chosen = "the first" if isinstance(self.source, IterableDataset) else "a fixed random choice"
            notes.append(f"{self.images} of {self.available} images, {chosen}")
        if self.limit and self.available and self.available < self.limit:
            notes.append(f"{self.available} images, fewer than the {self.limit} asked for: the split holds no more")
        if skipped:
            what = "1 unreadable image" if len(skipped) == 1 else f"{len(skipped)} unreadable images"
            notes.append(f"{what} skipped (first: {skipped[0]})")
        return notes

    def some(self, count: int) -> Batches:
        """At most `count` of these images, a fixed random choice that is not shuffled, however many of them are unreadable."""
        return replace(self, limit=min(count, self.limit or count), shuffle=False, max_corrupt=1.0, skipped=[])

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
        indices = self._chosen()
        if self.shuffle:
            indices = generator.permutation(indices)
        rank, world = distributed.rank(), distributed.world()
        whole = [indices[at : at + self.batch_size] for at in range(0, len(indices), self.batch_size)][start:]
        shares = [[(number, index) for index in batch[rank::world].tolist()] for batch in whole]
        self._asked[:] = shares  # the loader's
        if self._loader is None:
            dataset = _Guarded(self.source, self._prepare, self.seed if self.augmented else None)
            self._loader = _loader(dataset, self.workers, batch_sampler=self._asked, collate_fn=_collate)
        empty = start == 0 and (any(shares) or not shares)  # a share may be empty where others' are not
        for images, labels in self._read(-(-len(indices) // world)):
            empty = empty and not len(images)
            yield images, labels
        if empty:
            raise EnvironmentFault("data: not one image could be read", "check data.root and the split")

    @property
    def _prepare(self) -> Prepare:
        return Prepare(self.transform, self.channels, self.exif)

    def _chosen(self) -> NDArray[np.int64]:
        indices = np.arange(len(self.source))  # type: ignore[arg-type]
        if not self.limit:
            return indices
        chosen = np.random.RandomState(self.seed).permutation(indices)[self.skip :][: self.limit]
        return chosen if self.shuffle else np.sort(chosen)

    def _read(self, total: int | None) -> Iterator[Batch]:
        """What the loader gives, checked; `total`: how many images this process asks for."""
        for loaded in self._loaded():
            if isinstance(loaded, LpvitError):
                raise loaded
            images, labels, unreadable = loaded
            self._count(unreadable, total)
            if not self.labelled:
                labels = torch.full_like(labels, -1)
            self._require_known(labels)
            yield images, labels

    def _loaded(self) -> Iterator[Any]:
        """What the loader gives; an EnvironmentFault where its workers are no more."""
        assert self._loader is not None
        try:
            yield from self._loader
        except RuntimeError as error:
            if fault := known(error):
                raise fault from error
            raise

    def _count(self, unreadable: list[str], total: int | None) -> None:
        self.skipped += [name for name in unreadable if name not in self.skipped]
        if unreadable and total and len(self.skipped) > self.max_corrupt * total:
            raise EnvironmentFault(
                f"data: {len(self.skipped)} of {total} images cannot be read so far, more than data.max_corrupt"
                f" (first: {self.skipped[0]})",
                "repair or remove them, or raise data.max_corrupt",
            )

    def _require_known(self, labels: Tensor) -> None:
        if not self.num_classes or not self.labelled:
            return
        if strange := [label for label in labels.tolist() if not 0 <= label < self.num_classes]:
            raise ForeignImage(
                f"data: an image has label {strange[0]}, but the model has classes 0 to {self.num_classes - 1}",
                "use the data set the model was trained on, or a model with a head for these classes",
            )

    def _stream(self) -> Iterator[Batch]:
        assert isinstance(self.source, IterableDataset)
        rank, world = distributed.rank(), distributed.world()
        seen = 0
        if self._loader is None:
            dataset = _Streamed(self.source, self._prepare)
            self._loader = _loader(dataset, min(self.workers, 1), batch_size=self.batch_size, collate_fn=_collate)
        for images, labels in self._read(self.images):
            images = images[: self.limit - seen] if self.limit else images
            labels = labels[: len(images)]
            seen += len(images)
            yield images[rank::world], labels[rank::world]
            if self.limit and seen >= self.limit:
                return


def batches(model: VisionModel, source: Reader | IterableDataset, data: DataSection, **options: Any) -> Batches:
    """Batches of `source` as `model` wants them, with the recipe's batch size, workers and patience."""
    options.setdefault("transform", transform_for(model))
    options.setdefault("batch_size", data.peek("batch_size"))  # what is evaluated does not depend on it
    options |= {"workers": data.peek("workers"), "max_corrupt": data.max_corrupt, "exif": data.exif or turns(model)}
    return Batches(source, num_classes=model.num_classes, channels=channels_of(model), **options)


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
