"""The model's own preprocessing, names of classes, single images."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from made_images import HALF, IMAGENET, Eye, Numbered, files, random_image, write_split
from PIL import Image
from timm.data import ImageNetInfo

from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.hub import Shards
from lpvit_cli.data.readers import class_names, open_images
from lpvit_cli.data.transforms import read_image, transform_for
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe.finetune import Augment


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
    assert class_names(reader) == class_names(Shards(dataset, "wds/x")) == ("cow", "bee", "ant")


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
