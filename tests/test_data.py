"""Images in: splits and labels, the model's own preprocessing, unreadable files, the order of batches, and refusals."""

from __future__ import annotations

import importlib.util
import os
import pickle
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers import create_reader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lpvit_cli import distributed
from lpvit_cli.commands import evaluate
from lpvit_cli.data import batches as batches_module
from lpvit_cli.data import readers as data_module
from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.readers import DigitsReader, SyntheticReader, class_names, open_images, require_same_classes
from lpvit_cli.data.transforms import read_image, transform_for
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.data import DataSection
from lpvit_cli.recipe.finetune import Augment
from lpvit_cli.tasks.classification import Accuracy
from lpvit_cli.tasks.evaluation import Validation

HALF, IMAGENET = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INSECTS = {"wasp": 2, "ant": 3, "bee": 1}


class Eye(nn.Module):
    """A model as far as its images are concerned."""

    def __init__(self, num_classes: int, **config: Any):
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": HALF[0], "std": HALF[1], "crop_pct": 1.0, **config}


class Numbered:
    """Image i is grey of brightness i and has label i; those in `broken` cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()):
        self.length, self.broken, self.asked = length, broken, list[int]()

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.asked.append(index)
        if index in self.broken:
            raise OSError("broken")
        return Image.new("L", (2, 2), index), index

    def __len__(self) -> int:
        return self.length

    def filename(self, index: int) -> str:
        return f"image {index}"


class Stream(IterableDataset):
    """Ten numbered images that can only be read one after the other, as timm's webdatasets are."""

    transform: Any = None

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return ((self.transform(Image.new("RGB", (2, 2), (i, i, i))), i) for i in range(10))


def brightness(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32)).permute(2, 0, 1)


def random_image(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def write_split(root: Path, name: str, classes: dict[str, int], kind: str = "folder") -> Path:
    """Class folders with that many PNGs each, or the same as a tar file."""
    split = root / name
    split.mkdir(parents=True)
    for label, (class_name, count) in enumerate(classes.items()):
        (split / class_name).mkdir()
        for i in range(count):
            random_image(100 * label + i).save(split / class_name / f"{i}.png")
    if kind == "tar":
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            archive.add(split, arcname=".")
        split.rename(root / "unpacked")
    return split


def files(root: Path | None, kind: str = "folder", **more: Any) -> DataSection:
    return DataSection(dataset=kind, root=root, workers=0, **more)


def labels_of(source: Batches, epoch: int = 0) -> list[int]:
    labels = []
    for images, batch in source.epoch(epoch):
        assert not len(batch) or images[:, 0, 0, 0].tolist() == batch.tolist(), "an image lost its label"
        labels += batch.tolist()
    return labels


both_kinds = pytest.mark.parametrize("kind", ["folder", "tar"])


# built-in images


def test_digits_have_two_disjoint_splits_that_never_change() -> None:
    train, val = DigitsReader("train"), DigitsReader("validation")
    assert (len(train), len(val)) == (1437, 360)

    from sklearn.datasets import load_digits

    whole = load_digits()
    everything = np.concatenate([train.images, val.images]).reshape(1797, -1)
    expected = np.round(whole.images * 255 / 16).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, everything)) == sorted(map(bytes, expected))
    labels = {bytes(image): label for image, label in zip(expected, whole.target, strict=True)}
    for reader in (train, val):
        assert [labels[reader[i][0].tobytes()] for i in range(len(reader))] == [reader[i][1] for i in range(len(reader))]
    assert np.array_equal(DigitsReader("train").images, train.images)
    assert [val[i][1] for i in range(12)] == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]
    assert class_names(train) == tuple("0123456789")


@pytest.mark.parametrize("split", ["test", "val", ""])
def test_digits_has_no_other_split(split: str) -> None:
    with pytest.raises(UsageError, match=f"digits has no split '{split}'") as caught:
        open_images(files(None, "digits"), split, Eye(10))
    assert caught.value.hint == "its splits are train and validation"


def test_generated_images_fit_the_model_and_repeat() -> None:
    section = files(None, "synthetic")
    model = Eye(5, input_size=(3, 16, 24))
    train, val = (open_images(section, split, model) for split in ("train", "validation"))
    assert (len(train), len(val)) == (64, 32)
    assert [train[i][1] for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert train[0][0].size == (24, 16)
    assert np.array_equal(train[3][0], SyntheticReader(4, 5, (16, 24))[3][0])
    assert not np.array_equal(train[3][0], train[4][0])


# the model's own preprocessing


@pytest.mark.parametrize(
    ("name", "normalisation", "image"),
    [
        ("vit_tiny_patch16_224", HALF, (50, 41)),
        ("deit_tiny_patch16_224", IMAGENET, (41, 50)),
        ("vit_tiny_patch16_224", HALF, (9, 7)),
    ],
)
def test_transform_is_resize_crop_and_normalise(
    name: str, normalisation: tuple[tuple[float, ...], ...], image: tuple[int, int]
) -> None:
    model = timm.create_model(name, img_size=32, depth=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    picture = random_image(7, *image)
    got = transform_for(model)(picture)

    short = 35  # floor(32 / 0.9)
    width, height = (short * side // min(image) for side in image)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    mean, std = np.array(normalisation)
    expected = ((np.asarray(resized) / 255 - mean) / std).transpose(2, 0, 1)
    assert got.shape == (3, 32, 32)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - expected).max() < 1e-5


def test_transform_follows_changed_preprocessing() -> None:
    model = Eye(2, input_size=(3, 20, 12), mean=(0.1, 0.2, 0.3), std=(1.0, 0.5, 0.25))
    picture = random_image(1, width=12, height=20)
    got = transform_for(model)(picture)
    expected = (np.asarray(picture) / 255 - [0.1, 0.2, 0.3]) / [1.0, 0.5, 0.25]
    assert np.abs(got.numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_only_augmentation_is_random() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model, picture = Eye(2), random_image(1)
    plain, augmented = transform_for(model), transform_for(model, augment=Augment())
    assert torch.equal(plain(picture), plain(picture))
    assert augmented(picture).shape == (3, 16, 16)
    assert len({bytes(augmented(picture).numpy()) for _ in range(8)}) > 1


def test_augmentation_at_its_strongest_breaks_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that refuses its own strength would pass for an unreadable image, one in some hundreds."""
    random.seed(0)
    torch.manual_seed(0)
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: mean + 3 * deviation)
    source = Batches(Numbered(150), transform_for(Eye(2), augment=Augment()), batch_size=50, max_corrupt=1.0)
    assert sum(len(labels) for _, labels in source) == 150
    assert source.skipped == []


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
def test_images_of_any_mode_become_rgb(tmp_path: Path, mode: str) -> None:
    split = write_split(tmp_path, "train", {"ant": 0, "bee": 0})
    random_image(0, 16, 16).convert(mode).save(split / "ant" / "0.png")
    random_image(1, 16, 16).save(split / "bee" / "0.png")
    model, section = Eye(2), files(tmp_path)
    ((images, labels),) = batches(model, open_images(section, "train", model), section)
    expected = np.asarray(random_image(0, 16, 16).convert(mode).convert("RGB")).transpose(2, 0, 1) / 127.5 - 1
    assert labels.tolist() == [0, 1]
    assert np.abs(images[0].numpy() - expected).max() < 1e-5


# class folders and tar files


@both_kinds
def test_labels_are_positions_in_the_sorted_class_names(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    model, section = Eye(3), files(tmp_path, kind)
    reader: Any = open_images(section, "train", model)
    assert len(reader) == 6
    found = [(Path(reader.filename(i)).parent.name, int(reader[i][1])) for i in range(6)]
    assert sorted(found) == [("ant", 0)] * 3 + [("bee", 1)] + [("wasp", 2)] * 2
    for images, labels in batches(model, reader, section):
        assert images.shape == (6, 3, 16, 16)
        assert sorted(labels.tolist()) == [0, 0, 0, 1, 2, 2]


@both_kinds
def test_classes_have_the_names_of_their_folders(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    assert class_names(open_images(files(tmp_path, kind), "train", Eye(3))) == ("ant", "bee", "wasp")


@pytest.mark.parametrize(
    ("split", "place"),
    [("validation", "val"), ("validation", "valid"), ("validation", "test"), ("train", "training"), ("mine", "mine")],
)
@both_kinds
def test_splits_are_found_under_their_usual_names(tmp_path: Path, kind: str, split: str, place: str) -> None:
    write_split(tmp_path, place, {"ant": 1, "bee": 1}, kind)
    assert len(open_images(files(tmp_path, kind), split, Eye(2))) == 2  # type: ignore[arg-type]


def test_validation_is_the_first_of_its_names(tmp_path: Path) -> None:
    write_split(tmp_path, "test", {"ant": 5, "bee": 1})
    write_split(tmp_path, "val", {"ant": 1, "bee": 1})
    assert len(open_images(files(tmp_path), "validation", Eye(2))) == 2  # type: ignore[arg-type]


@both_kinds
def test_a_missing_split_is_never_replaced_by_another(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    ending = ".tar" if kind == "tar" else ""
    with pytest.raises(UsageError, match=rf"has no validation{ending} or val{ending} or") as caught:
        open_images(files(tmp_path, kind), "validation", Eye(3))
    assert str(tmp_path) in caught.value.message
    assert "data.root" in caught.value.hint
    with pytest.raises(UsageError, match=f"has no mine{ending}$"):
        open_images(files(tmp_path, kind), "mine", Eye(3))


def test_folders_are_no_tar_files(tmp_path: Path) -> None:
    write_split(tmp_path, "train", INSECTS)
    with pytest.raises(UsageError, match=r"has no train\.tar"):
        open_images(files(tmp_path, "tar"), "train", Eye(3))


@both_kinds
def test_root_must_be_given_and_exist(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match="data.root") as caught:
        open_images(files(None, kind), "train", Eye(3))
    assert "--set data.root=" in caught.value.hint
    with pytest.raises(UsageError, match="absent: does not exist, so has no train"):
        open_images(files(tmp_path / "absent", kind), "train", Eye(3))


@both_kinds
def test_a_split_without_images(tmp_path: Path, kind: str) -> None:
    split = write_split(tmp_path, "train", {"ant": 0, "bee": 0}, kind)
    with pytest.raises(UsageError, match=rf"{split.name}.*: holds no images"):
        open_images(files(tmp_path, kind), "train", Eye(2))


@pytest.mark.parametrize("damage", [lambda tar: tar[: len(tar) // 2 + 100], lambda tar: b"not a tar file"])
def test_a_damaged_tar_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write_split(tmp_path, "train", INSECTS, "tar")
    archive = tmp_path / "train.tar"
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(EnvironmentFault, match=r"train\.tar"):
        open_images(files(tmp_path, "tar"), "train", Eye(3))


@both_kinds
def test_one_class_is_no_classification(tmp_path: Path, kind: str) -> None:
    write_split(tmp_path, "train", {"ant": 2}, kind)
    with pytest.raises(UsageError, match=r"train split has only one class \(ant\)"):
        open_images(files(tmp_path, kind), "train", Eye(1))


def test_images_without_class_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    random_image(0).save(tmp_path / "train" / "0.png")
    with pytest.raises(UsageError, match="only one class") as caught:
        open_images(files(tmp_path), "train", Eye(1))
    assert "one folder per class" in caught.value.hint


@pytest.mark.parametrize("num_classes", [2, 4, 1000])
@both_kinds
def test_as_many_classes_as_the_model_has(tmp_path: Path, kind: str, num_classes: int) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    with pytest.raises(UsageError, match=f"train split has 3 classes, the model tells {num_classes} apart") as caught:
        open_images(files(tmp_path, kind), "train", Eye(num_classes))
    assert "num_classes=3" in caught.value.hint


@both_kinds
def test_both_splits_need_the_same_classes(tmp_path: Path, kind: str) -> None:
    for name, classes in {"train": ["ant", "bee"], "val": ["ant", "cow"], "test": ["bee", "ant"]}.items():
        write_split(tmp_path / name, name, dict.fromkeys(classes, 1), kind)
    section = {name: files(tmp_path / name, kind) for name in ("train", "val", "test")}
    train, val, same = (open_images(section[name], name, Eye(2)) for name in section)
    with pytest.raises(UsageError, match="different classes.*bee, cow"):
        require_same_classes(train, val)
    require_same_classes(train, same)
    require_same_classes(train, Numbered(3))


# unreadable images


@pytest.fixture
def twenty_with_two_broken(tmp_path: Path) -> Path:
    split = write_split(tmp_path, "train", {"ant": 10, "bee": 10})
    whole = (split / "ant" / "3.png").read_bytes()
    (split / "ant" / "3.png").write_bytes(whole[: len(whole) // 2])
    (split / "bee" / "3.png").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 7), (2, 20)])
def test_unreadable_images_are_skipped_and_counted_once(twenty_with_two_broken: Path, workers: int, batch_size: int) -> None:
    section = DataSection(
        dataset="folder", root=twenty_with_two_broken, workers=workers, batch_size=batch_size, max_corrupt=0.1
    )
    model = Eye(2)
    source = batches(model, open_images(section, "train", model), section, shuffle=True)
    for epoch in range(3 if not workers else 1):
        labels = [label for images, batch in source.epoch(epoch) for label in batch.tolist() if len(images) == len(batch)]
        assert sorted(labels) == [0] * 9 + [1] * 9
        assert sorted(source.skipped) == ["ant/3.png", "bee/3.png"]


def test_too_many_unreadable_images_are_an_error(twenty_with_two_broken: Path) -> None:
    section, model = files(twenty_with_two_broken, max_corrupt=0.09), Eye(2)
    with pytest.raises(EnvironmentFault, match=r"2 of 20 images.*max_corrupt.*first: (ant|bee)/3\.png") as caught:
        list(batches(model, open_images(section, "train", model), section))
    assert "max_corrupt" in caught.value.hint


def test_the_fraction_is_of_the_images_asked_for() -> None:
    """One of four is more than a tenth, though one of forty would not be; nothing has to be read to its end to know."""
    reader = Numbered(40, broken=(0,))
    source = Batches(reader, brightness, batch_size=1, limit=4, max_corrupt=0.1)
    with pytest.raises(EnvironmentFault, match="1 of 4 images"):
        list(source)
    assert reader.asked == [0]
    assert len(labels_of(Batches(reader, brightness, batch_size=1, max_corrupt=0.1))) == 39


def test_a_batch_of_broken_images_is_left_out() -> None:
    source = Batches(Numbered(6, broken=(2, 3)), brightness, batch_size=2, max_corrupt=1.0)
    assert [labels.tolist() for _, labels in source] == [[0, 1], [4, 5]]
    assert source.skipped == ["image 2", "image 3"]


@pytest.mark.parametrize("failure", [OSError, SyntaxError, ValueError, Image.DecompressionBombError])
@pytest.mark.parametrize("place", ["opening", "decoding"])
def test_whatever_pillow_raises_is_an_unreadable_image(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception], place: str
) -> None:
    def fail(*args: object, **more: object) -> Any:
        raise failure("unreadable")

    reader = Numbered(3)
    if place == "opening":
        monkeypatch.setattr(Numbered, "__getitem__", fail)
    else:
        monkeypatch.setattr(Image.Image, "convert", fail)
    source = Batches(reader, brightness, batch_size=2, max_corrupt=1.0)
    with pytest.raises(EnvironmentFault, match="not one image could be read"):
        list(source)
    assert source.skipped == ["image 0", "image 1", "image 2"]


@pytest.mark.parametrize("bug", [ZeroDivisionError, OSError, SyntaxError, ValueError, Image.DecompressionBombError])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_no_unreadable_images(bug: type[Exception], augmented: bool, workers: int) -> None:
    """Only a file can be damaged: a transform that fails on an image that was read is wrong, whatever it raises."""

    def fail(image: Image.Image) -> Tensor:
        raise bug("in the transform")

    source = Batches(Numbered(3), fail, batch_size=2, max_corrupt=1.0, augmented=augmented, workers=workers)
    with pytest.raises(bug, match="in the transform"):
        list(source)
    assert source.skipped == []


# the order of batches


@pytest.mark.parametrize("limit", [None, 20])
def test_order_depends_on_seed_and_epoch_only(limit: int | None) -> None:
    def orders(seed: int) -> list[list[int]]:
        source = Batches(Numbered(40), brightness, batch_size=7, shuffle=True, seed=seed, limit=limit)
        return [labels_of(source, epoch) for epoch in (0, 1, 2)]

    first = orders(seed=3)
    np.random.seed(99)
    torch.manual_seed(99)
    assert orders(seed=3) == first
    later = Batches(Numbered(40), brightness, batch_size=5, shuffle=True, seed=3, limit=limit, workers=1)
    assert labels_of(later, 2) == first[2], "an epoch depends on those before it, on the batch size or on the workers"
    assert len({tuple(order) for order in first + orders(seed=4)}) == 6


def test_every_image_is_seen_once() -> None:
    shuffled = labels_of(Batches(Numbered(40), brightness, batch_size=7, shuffle=True), epoch=5)
    assert shuffled != list(range(40))
    assert sorted(shuffled) == list(range(40))
    assert labels_of(Batches(Numbered(40), brightness, batch_size=7), epoch=5) == list(range(40))


def test_limit_takes_the_first_images_or_a_choice_fixed_by_the_seed() -> None:
    assert labels_of(Batches(Numbered(40), brightness, batch_size=7, limit=10)) == list(range(10))
    chosen = {}
    for seed in (0, 1):
        source = Batches(Numbered(40), brightness, batch_size=7, limit=10, shuffle=True, seed=seed)
        epochs = [labels_of(source, epoch) for epoch in range(4)]
        assert len(set(epochs[0])) == 10
        assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
        assert len({tuple(epoch) for epoch in epochs}) == 4
        chosen[seed] = set(epochs[0])
    assert chosen[0] != chosen[1]
    assert max(chosen[0]) >= 10, "a random choice of 10 out of 40 is not the first ten"


@pytest.mark.parametrize(("limit", "images", "count"), [(None, 40, 6), (10, 10, 2), (14, 14, 2), (15, 15, 3), (99, 40, 6)])
def test_length_is_the_number_of_batches(limit: int | None, images: int, count: int) -> None:
    source = Batches(Numbered(40), brightness, batch_size=7, limit=limit)
    sizes = [len(labels) for _, labels in source]
    assert (source.images, len(source)) == (images, count)
    assert (sum(sizes), len(sizes)) == (images, count)


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"batch_size": 5, "max_corrupt": 0.5}])
def test_batches_take_size_and_patience_from_the_recipe(settings: dict[str, Any]) -> None:
    section = DataSection(dataset="synthetic", workers=0, **settings)
    source = batches(Eye(10), Numbered(10), section)
    assert len(next(iter(source))[1]) == section.batch_size == source.batch_size
    assert source.max_corrupt == section.max_corrupt
    assert len(batches(Eye(10), Numbered(10), section, batch_size=2)) == 5


@pytest.mark.parametrize(
    ("limit", "sizes"), [(None, [3, 3, 3, 1]), (7, [3, 3, 1]), (6, [3, 3]), (2, [2]), (10, [3, 3, 3, 1]), (12, [3, 3, 3, 1])]
)
def test_streams_stop_at_the_limit(limit: int | None, sizes: list[int]) -> None:
    source = Batches(Stream(), brightness, batch_size=3, limit=limit)
    for epoch in (0, 1):
        assert labels_of(source, epoch) == list(range(sum(sizes)))
    assert [len(labels) for _, labels in source] == sizes
    assert source.images == limit
    if limit and limit <= 10:
        assert len(source) == len(sizes)


# workers


def drawn(image: Image.Image) -> Tensor:
    """What the transform draws, and which process does."""
    return torch.tensor([float(torch.rand(())), random.random(), float(os.getpid())])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_stay_and_an_epoch_depends_on_nothing_before_it(workers: int) -> None:
    """Not on epochs that were read before it, nor on one that was left half-way, nor on the random numbers of the process."""

    def numbers(source: Batches, epoch: int, start: int = 0) -> tuple[list[list[float]], set[float]]:
        rows = torch.cat([images for images, _ in source.epoch(epoch, start)]).tolist()
        return [row[:2] for row in rows], {row[2] for row in rows}

    options: dict[str, Any] = {"batch_size": 4, "shuffle": True, "augmented": True, "seed": 5}
    source = Batches(Numbered(24), drawn, workers=workers, **options)
    first, processes = numbers(source, 0)
    torch.manual_seed(99)
    half = source.epoch(1)
    next(half)
    half.close()
    second, others = numbers(source, 2)
    assert processes == others, "workers were started again"
    assert len(processes) == workers
    assert os.getpid() not in processes
    for epoch, expected in ((2, second), (0, first)):
        assert numbers(source, epoch)[0] == numbers(Batches(Numbered(24), drawn, **options), epoch)[0] == expected
    assert numbers(source, 2, start=4)[0] == second[16:]
    assert first != second


def test_evaluate_decodes_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Validation, model: nn.Module, what: str) -> Accuracy:
        assert self.images.workers == evaluate.WORKERS
        return Accuracy(50.0, 50.0, len(list(self.images)))

    assert min(4, (os.cpu_count() or 1) - 1) == evaluate.WORKERS
    monkeypatch.setattr(evaluate, "open_model", lambda name: (Eye(10), {}))
    monkeypatch.setattr(Validation, "accuracy", read)
    report = evaluate.evaluate("eye", "synthetic", None, None, 8, 4, "cpu", "float32", lambda *told: None)
    assert report.accuracy.images == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_no_random_numbers_of_others(workers: int) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    list(Batches(Numbered(4), brightness, batch_size=2, workers=workers))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("source", [Numbered(4), Stream()])
def test_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch, on_gpu: bool, source: Any) -> None:
    asked: dict[str, Any] = {}

    def loader(*args: Any, pin_memory: bool, **options: Any) -> Any:
        asked.update(options, pin_memory=pin_memory)
        return DataLoader(*args, **options)

    monkeypatch.setattr(batches_module, "DataLoader", loader)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    list(Batches(source, brightness, batch_size=2))
    assert asked["pin_memory"] is on_gpu


@both_kinds
def test_one_process_walks_and_the_others_get_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    write_split(tmp_path, "train", INSECTS, kind)
    alone: Any = open_images(files(tmp_path, kind), "train", Eye(3))
    sent: list[bytes] = []

    def broadcast(thing: Any) -> Any:
        if distributed.is_main():
            sent.append(pickle.dumps(thing))
        return pickle.loads(sent[-1])

    def walk(*args: Any) -> Any:
        assert distributed.is_main(), "another process walks too"
        return create_reader(*args)

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    monkeypatch.setattr(data_module, "create_reader", walk)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        reader: Any = open_images(files(tmp_path, kind), "train", Eye(3))
        assert [reader.filename(i) for i in range(6)] == [alone.filename(i) for i in range(6)]
        assert [int(reader[i][1]) for i in range(6)] == [int(alone[i][1]) for i in range(6)]
        assert reader[3][0].read() == alone[3][0].read()
        assert class_names(reader) == ("ant", "bee", "wasp")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        with pytest.raises(UsageError, match="holds no images"):
            open_images(files(tmp_path / "empty"), "train", Eye(3))


# data sets by name


@pytest.mark.parametrize("name", ["imagenet", "Digits", "hfds/", "wds", "tfds/mnist", ""])
def test_unknown_data_sets_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown dataset '{name}'") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert all(known in caught.value.hint for known in ("digits", "synthetic", "folder", "tar", "hfds/NAME", "wds/NAME"))


@pytest.mark.parametrize(
    ("name", "package", "line"),
    [
        ("hfds/x", "datasets", "pip install datasets"),
        ("wds/x", "webdataset", "pip install webdataset"),
        ("digits", "sklearn", "pip install scikit-learn"),
    ],
)
def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str, line: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == package else real(module))
    with pytest.raises(EnvironmentFault, match=f"the package '{package}' is not installed") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert caught.value.hint == line


@pytest.mark.parametrize("name", ["hfds/owner/x", "wds/x"])
def test_data_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no route to the hub\na long trace")

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setattr(data_module, "create_reader", fail)
    monkeypatch.setattr(timm.data, "create_dataset", fail)
    with pytest.raises(EnvironmentFault, match=f"cannot open '{name}': no route to the hub$") as caught:
        open_images(files(None, name), "train", Eye(10))
    assert "network" in caught.value.hint


def test_shards_are_a_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, root: str, **options: Any) -> Stream:
        asked.update(options, name=name, root=root)
        return Stream()

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: object())
    monkeypatch.setattr(timm.data, "create_dataset", create)
    section = DataSection(dataset="wds/x", root=tmp_path, workers=0, batch_size=4)
    source = batches(Eye(10), open_images(section, "mine", Eye(10)), section, transform=brightness, limit=6)
    assert labels_of(source) == list(range(6))
    assert asked == {"name": "wds/x", "root": str(tmp_path), "split": "mine", "is_training": False, "batch_size": 4}


# names and single images


def test_synsets_are_put_into_words() -> None:
    reader = Numbered(0)
    synsets = ImageNetInfo().label_names()
    reader.class_to_idx = {synset: label for label, synset in reversed(list(enumerate(synsets)))}  # type: ignore[attr-defined]
    names = class_names(reader)
    assert names is not None
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert names[207].startswith("golden retriever")
    assert names[999].startswith("toilet")

    del reader.class_to_idx["n01440764"]  # type: ignore[attr-defined]
    assert class_names(reader) == tuple(synsets[1:]), "999 synsets are not ImageNet"
    reader.class_to_idx = {f"n{i:04d}x": i for i in range(1000)}  # type: ignore[attr-defined]
    assert class_names(reader) == tuple(f"n{i:04d}x" for i in range(1000)), "nor are a thousand other names"


def test_class_names_come_in_label_order() -> None:
    reader, dataset = Numbered(0), Numbered(0)
    assert class_names(reader) is None
    reader.class_to_idx = {"ant": 2, "cow": 0, "bee": 1}  # type: ignore[attr-defined]
    dataset.reader = reader  # type: ignore[attr-defined]
    assert class_names(reader) == class_names(dataset) == ("cow", "bee", "ant")


def test_an_image_is_read_as_rgb(tmp_path: Path) -> None:
    random_image(0).convert("P").save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert np.array_equal(image, random_image(0).convert("P").convert("RGB"))


def test_a_missing_image_is_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.png: no such image"):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("content", ["text", "half", "nothing", "folder", "bomb"])
def test_files_that_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = tmp_path / "x.png"
    random_image(0).save(path)
    if content == "folder":
        path.unlink()
        path.mkdir()
    elif content == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        path.write_bytes({"text": b"not an image", "half": path.read_bytes()[:600], "nothing": b""}[content])
    with pytest.raises(EnvironmentFault, match=r"x\.png: not a readable image"):
        read_image(path)
