"""Pixels are converted by value, into as many channels as the model takes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import Eye, files, random_image
from PIL import Image

from lpvit_cli.data.batches import batches
from lpvit_cli.data.pixels import as_model_image, read_picture
from lpvit_cli.data.readers import open_images
from lpvit_cli.data.transforms import read_image, transform_for, turns
from lpvit_cli.errors import ForeignImage, UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.recipe.finetune import Augment
from lpvit_cli.recipe.model import ModelSection, Preprocess

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))  # of mean 127.5
DEEP = RAMP.astype(np.uint16) * 257

ENCODINGS: dict[str, Any] = {
    "8 bits": Image.fromarray(RAMP),
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.frombytes("I;16B", (256, 4), DEEP.astype(">u2").tobytes()),
    "I": Image.fromarray(DEEP.astype(np.int32)),
    "F to 1": Image.fromarray(RAMP.astype(np.float32) / 255),
    "F to 255": Image.fromarray(RAMP.astype(np.float32)),
    "F to 65535": Image.fromarray(DEEP.astype(np.float32)),
    "P": Image.fromarray(RAMP).convert("P"),
    "LA": Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (256, 4), 9)]),
    "RGBA": Image.merge("RGBA", [Image.fromarray(RAMP)] * 3 + [Image.new("L", (256, 4), 9)]),
    "CMYK": Image.fromarray(RAMP).convert("CMYK"),
    "array": RAMP,
    "array of 16 bits": DEEP,
    "array of shares": RAMP / 255,
    "array [H, W, 1]": RAMP[..., None],
    "array [H, W, 3]": np.stack([RAMP] * 3, axis=-1),
    "array [3, H, W]": np.stack([DEEP] * 3).astype(">u2"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_ramp_is_the_same_in_every_encoding(encoding: str, channels: int, mode: str) -> None:
    got = as_model_image(ENCODINGS[encoding], channels)
    assert isinstance(got, Image.Image)
    assert got.mode == mode
    expected = RAMP if channels == 1 else np.stack([RAMP] * 3, axis=-1)
    assert np.abs(np.asarray(got, np.int64) - expected).max() <= 1


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "shares.tif", "deep.npy"])
def test_files_are_read_by_value(tmp_path: Path, name: str) -> None:
    if name.endswith(".npy"):
        np.save(tmp_path / name, DEEP)
    else:
        Image.fromarray(RAMP.astype(np.float32) / 255 if "shares" in name else DEEP).save(tmp_path / name)
    assert np.asarray(read_image(tmp_path / name)).mean() == 127.5


def test_colours_become_grey_as_in_pillow() -> None:
    colours = random_image(0)
    expected = np.asarray(colours) @ [0.299, 0.587, 0.114]
    assert np.abs(np.asarray(as_model_image(colours, 1)) - expected).max() <= 1


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -1.0, 70_000.0])
@pytest.mark.parametrize("channels", [1, 3, 2])
def test_values_of_no_scale_are_unreadable(spoiled: float, channels: int) -> None:
    array = np.zeros((4, 4, 2 if channels == 2 else 1), np.float32)
    array[1, 1] = spoiled
    with pytest.raises(ValueError, match="not a number"):
        as_model_image(array, channels)
    if channels == 1:
        with pytest.raises(ValueError, match="not a number"):
            as_model_image(Image.fromarray(array[..., 0]), channels)


@pytest.mark.parametrize(("dtype", "largest"), [(np.uint8, 255), (np.uint16, 65535), (np.float32, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_arrays_of_many_channels_are_shares(dtype: Any, largest: float, first: bool) -> None:
    array = (np.random.RandomState(0).rand(6, 8, 5) * largest).astype(dtype)
    got = as_model_image(array.transpose(2, 0, 1) if first else array, 5)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - array.transpose(2, 0, 1) / largest).max() < 1e-6


def test_bands_and_frames_are_channels() -> None:
    rgba = Image.fromarray(np.random.RandomState(0).randint(0, 256, (4, 6, 4), np.uint8), "RGBA")
    got = as_model_image(rgba, 4)
    assert np.allclose(got, np.asarray(rgba).transpose(2, 0, 1) / 255)
    frames, file = [Image.fromarray(DEEP // n) for n in (1, 2, 3, 4, 5)], io.BytesIO()
    frames[0].save(file, "TIFF", save_all=True, append_images=frames[1:])
    file.seek(0)
    got = read_picture(file, 5)
    assert np.allclose(got, np.stack([DEEP // n for n in (1, 2, 3, 4, 5)]) / 65535, atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "channels", "message"),
    [
        (random_image(0), 4, "has 3 channels, the model takes 4"),
        (np.zeros((8, 9, 5), np.uint8), 3, "has 5 channels, the model takes 3"),
        (np.zeros((8, 9), np.uint8), 2, "has 1 channel, the model takes 2"),
        (np.zeros((2, 8, 9, 5), np.uint8), 5, "an array of 4 dimensions"),
        (np.zeros((8, 9), np.int64), 3, "an array of int64"),
    ],
)
def test_what_a_model_cannot_take(picture: Any, channels: int, message: str) -> None:
    with pytest.raises(ForeignImage, match=message):
        as_model_image(picture, channels)


@pytest.mark.parametrize("workers", [0, 1])
def test_other_channels_stop_the_command_and_name_the_file(tmp_path: Path, workers: int) -> None:
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 9, 5), np.uint8))
    section = files(tmp_path).model_copy(update={"workers": workers})
    source = batches(Eye(2), open_images(section, "all", Eye(2)), section)
    with pytest.raises(UsageError, match=r"^data: 0\.npy has 5 channels, the model takes 3$") as caught:
        list(source)
    assert "model.kwargs.in_chans=5" in caught.value.hint
    with pytest.raises(UsageError, match=r"0\.npy: has 5 channels"):
        read_image(tmp_path / "0.npy")


def test_inks_are_no_channels(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4)).save(tmp_path / "0.jpg")
    Image.new("CMYK", (4, 4)).save(tmp_path / "0.tif")
    with pytest.raises(UsageError, match=r"0\.jpg: is in CMYK"):
        read_image(tmp_path / "0.jpg", channels=4)
    assert read_image(tmp_path / "0.tif", channels=4).shape == (4, 4, 4)  # type: ignore[union-attr]
    assert read_image(tmp_path / "0.jpg").mode == "RGB"  # type: ignore[union-attr]


def test_damaged_arrays_are_unreadable(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", RAMP)
    np.save(tmp_path / "2.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "1.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:200])
    section = files(tmp_path, max_corrupt=1.0)
    source = batches(Eye(2), open_images(section, "all", Eye(2)), section)
    assert [len(labels) for _, labels in source] == [1]
    assert source.skipped == ["1.npy", "2.npy"]


@pytest.mark.parametrize(("exif", "known"), [(False, False), (True, False), (False, True)])
def test_photographs_are_turned_only_if_asked(tmp_path: Path, exif: bool, known: bool) -> None:
    """By the data, or by the model, which remembers what it was pruned with."""
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.fromarray(np.repeat(RAMP, 64, axis=0)).convert("RGB").save(tmp_path / "0.png", exif=turned)
    section = files(tmp_path, exif=exif)
    model = Eye(2, input_size=(3, 256, 256), crop_mode="squash", exif=known)
    ((images, _),) = batches(model, open_images(section, "all", model), section)
    darkest = images[0, 0].mean(dim=0 if exif or known else 1)
    assert float(darkest.std()) < 0.01, "the ramp goes along the other axis"
    alone = np.asarray(read_image(tmp_path / "0.png", exif=turns(model)))
    assert (alone[:, 0, 0].std() > 1) == known


@pytest.mark.parametrize(("channels", "augment"), [(1, Augment()), (1, None), (5, Augment(rand_augment=None)), (5, None)])
def test_models_of_other_channels_get_what_they_take(tmp_path: Path, channels: int, augment: Augment | None) -> None:
    means = tuple(0.1 * (c + 1) for c in range(channels))
    model = Eye(2, input_size=(channels, 16, 16), mean=means, std=(0.5,) * channels)
    array = np.random.RandomState(0).randint(0, 256, (16, 16, channels), np.uint8)
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", array)
    reader = open_images(files(tmp_path), "all", model)
    options = {"transform": transform_for(model, augment), "augmented": augment is not None}
    ((images, _),) = batches(model, reader, files(tmp_path), **options)
    assert images.shape == (8, channels, 16, 16)
    if augment:
        assert len({image.numpy().tobytes() for image in images}) > 1
    else:
        expected = (array / 255 - np.array(means)) / 0.5
        assert np.abs(images[0].numpy() - expected.transpose(2, 0, 1)).max() < 1e-5


def test_colour_augmentation_needs_colours() -> None:
    model = Eye(2, input_size=(5, 16, 16), mean=(0.5,) * 5, std=(0.5,) * 5)
    with pytest.raises(UsageError, match="takes 5 channels") as caught:
        transform_for(model, Augment())
    assert caught.value.hint == "--set finetune.augment.rand_augment=null"


@pytest.mark.parametrize(("channels", "mean"), [(1, None), (4, None), (3, (0.5,)), (2, (0.1, 0.2))])
def test_a_model_knows_its_channels_and_their_means(channels: int, mean: tuple[float, ...] | None) -> None:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    section = ModelSection(
        name="deit_tiny_patch16_224", kwargs=kwargs | {"in_chans": channels}, preprocess=Preprocess(mean=mean)
    )
    model = build_model(section)
    assert model.pretrained_cfg["input_size"] == (channels, 32, 32)
    grey = (0.485 + 0.456 + 0.406) / 3
    assert model.pretrained_cfg["mean"] == pytest.approx(mean if mean and len(mean) > 1 else (mean or (grey,)) * channels)
    reader = open_images(files(None, "synthetic"), "train", model)
    images, _ = next(iter(batches(model, reader, files(None, "synthetic"))))
    assert images.shape == (64, channels, 32, 32)
    assert torch.isfinite(model(images[:2])).all()


def test_means_of_another_number_of_channels_are_refused() -> None:
    section = ModelSection(name="vit_tiny_patch16_224", kwargs={"depth": 1}, preprocess=Preprocess(std=(0.1, 0.2)))
    with pytest.raises(UsageError, match=r"preprocess\.std: has 2 values, the model takes 3 channels"):
        build_model(section)
