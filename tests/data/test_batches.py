"""Batches: unreadable images, their order, and workers."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import INSECTS, Eye, Numbered, Stream, both_kinds, brightness, files, labels_of, write_split
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lpvit_cli import distributed
from lpvit_cli.commands import evaluate
from lpvit_cli.data import batches as batches_module
from lpvit_cli.data import readers as data_module
from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.readers import class_names, open_images
from lpvit_cli.data.splits import calibration_batches, held_back_batches
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.data import CalibrateSection, DataSection
from lpvit_cli.tasks.evaluation import Validation
from lpvit_cli.tasks.quality import ClassificationQuality


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
    reader = Numbered(40, broken=(4,))
    source = Batches(reader, brightness, batch_size=1, limit=4, max_corrupt=0.1)
    with pytest.raises(EnvironmentFault, match="1 of 4 images"):
        list(source)
    assert reader.asked == [4]
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
def test_bugs_are_no_unreadable_images(
    monkeypatch: pytest.MonkeyPatch, bug: type[Exception], augmented: bool, workers: int
) -> None:
    """Only a file can be damaged: a transform that fails on an image that was read is wrong, whatever it raises."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # torch waits so long for a worker's end

    def fail(image: Image.Image) -> Tensor:
        raise bug("in the transform")

    source = Batches(Numbered(3), fail, batch_size=2, max_corrupt=1.0, augmented=augmented, workers=workers)
    with pytest.raises(bug, match="in the transform"):
        list(source)
    assert source.skipped == []


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


def test_limit_takes_a_choice_fixed_by_the_seed() -> None:
    assert labels_of(Batches(Numbered(40), brightness, batch_size=7, limit=10)) == [4, 10, 11, 15, 18, 20, 22, 25, 28, 29]
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


@pytest.mark.parametrize("shuffle", [False, True])
def test_skipped_images_are_those_that_a_smaller_choice_holds(shuffle: bool) -> None:
    def chosen(limit: int, skip: int) -> Batches:
        return Batches(Numbered(40), brightness, batch_size=7, limit=limit, skip=skip, shuffle=shuffle, seed=3)

    whole, first, rest = (labels_of(chosen(*these)) for these in ((25, 0), (10, 0), (15, 10)))
    assert not set(first) & set(rest)
    assert sorted(first + rest) == sorted(whole)
    last = chosen(15, 30)
    assert (last.images, len(last), len(labels_of(last))) == (10, 2, 10), "no more than there are"


@pytest.mark.parametrize(("images", "held_back"), [(10, 64), (90, 10), (99, 1)])
def test_images_are_held_back_from_calibration(tmp_path: Path, images: int, held_back: int) -> None:
    split = tmp_path / "train" / "ant"
    split.mkdir(parents=True)
    for number in range(100):
        Image.new("RGB", (16, 16), (2 * number,) * 3).save(split / f"{number}.png")
    model, section, settings = Eye(1), files(tmp_path), CalibrateSection(images=images)

    def seen(source: Batches) -> set[int]:
        return {round(float(pixel) * 1000) for batch, _ in source for pixel in batch[:, 0, 0, 0]}

    calibration, others = (make(section, settings, 5, model) for make in (calibration_batches, held_back_batches))
    assert len(seen(calibration)) == images
    assert len(seen(others)) == held_back
    assert not seen(calibration) & seen(others)
    assert held_back_batches(section, CalibrateSection(images=100), 5, model) is None


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
    def read(self: Validation, model: nn.Module, what: str) -> ClassificationQuality:
        assert self.images.workers == evaluate.WORKERS
        return ClassificationQuality(len(list(self.images)), 50.0, 50.0)

    assert min(4, (os.cpu_count() or 1) - 1) == evaluate.WORKERS
    monkeypatch.setattr(evaluate, "open_model", lambda name: (Eye(10), {}))
    monkeypatch.setattr(Validation, "quality", read)
    report = evaluate.evaluate("eye", "synthetic", None, None, 8, 4, "cpu", "float32", None, None, None, lambda *told: None)
    assert report.quality.images == 2


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
        return read_files(*args)

    read_files = data_module._read_files
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast", broadcast)
    monkeypatch.setattr(data_module, "_read_files", walk)
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
