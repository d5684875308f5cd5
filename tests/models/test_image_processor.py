"""The pixels of Hugging Face image processors against those of lpvit's transform for the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf import checkpoint, transformers
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from torch.nn import functional as F

from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.models.build import build_model
from lpvit_cli.models.families.image_processor import _share, preprocessing_of
from lpvit_cli.recipe.model import ModelSection

SQUARE = {"height": 32, "width": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "squeezed": ("ViTImageProcessorPil", {"size": SQUARE}),
    "squeezed and cropped": (
        "BeitImageProcessorPil",
        {"size": {"height": 48, "width": 48}, "crop_size": SQUARE, "do_center_crop": True},
    ),
    "squeezed, cropping switched off": (
        "DeiTImageProcessorPil",
        {"size": SQUARE, "crop_size": SQUARE, "do_center_crop": False},
    ),
    "shorter side, cropped": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}),
    "shorter side of an odd size": ("BitImageProcessorPil", {"size": {"shortest_edge": 37}, "crop_size": SQUARE}),
    "nearest": ("SiglipImageProcessorPil", {"size": SQUARE, "resample": 0}),
    "not rescaled": (
        "ViTImageProcessorPil",
        {"size": SQUARE, "do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3},
    ),
    "not normalised": ("ViTImageProcessorPil", {"size": SQUARE, "do_normalize": False}),
    "each channel its own": (
        "ViTImageProcessorPil",
        {"size": SQUARE, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    ),
}


def picture() -> Image.Image:
    """Smooth, and wider than high."""
    coarse = torch.rand(1, 3, 9, 14, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, (150, 230), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    return Image.fromarray((pixels.numpy() * 255).astype("uint8"))


@pytest.mark.parametrize("case", CASES)
def test_images_are_prepared_as_the_checkpoint_wants_them(tmp_path: Path, case: str) -> None:
    name, arguments = CASES[case]
    processor = getattr(transformers, name)(**arguments)
    folder = checkpoint(tmp_path, "ViTModel")
    processor.save_pretrained(folder)
    model = build_model(ModelSection(name=f"transformers:{folder}", pretrained=True))
    wanted = processor(picture(), return_tensors="np")["pixel_values"][0]
    got = transform_for(model)(picture()).numpy()
    assert got.shape == wanted.shape == (3, 32, 32)
    assert np.abs(got - wanted).max() < 1e-5


def test_without_a_processor_images_are_squeezed_to_the_size_of_the_config(tmp_path: Path) -> None:
    model = build_model(ModelSection(name=f"transformers:{checkpoint(tmp_path, 'ViTModel')}"))
    wanted = transformers.ViTImageProcessorPil(size=SQUARE)(picture(), return_tensors="np")["pixel_values"][0]
    assert np.abs(transform_for(model)(picture()).numpy() - wanted).max() < 1e-5


def test_another_size_in_the_recipe_keeps_the_share_of_the_crop(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "ViTModel")
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=SQUARE).save_pretrained(folder)
    model = build_model(ModelSection(name=f"transformers:{folder}", kwargs={"image_size": 48}))
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)
    assert model.pretrained_cfg["crop_pct"] == 0.8


def test_the_share_gives_the_size_back_that_it_was_made_of() -> None:
    for resized in range(224, 700):
        for kept in (192, 224):
            assert int(kept / _share(kept, resized)) == resized


def test_only_a_file_that_is_not_there_means_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, **more: Any) -> str:
        asked.append((repository, name, more))
        raise errors[0]

    errors: list[Exception] = [EntryNotFoundError("there is none")]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert preprocessing_of("owner/name@v2", {"image_size": 32}, False)["input_size"] == (3, 32, 32)
    assert [one[0] for one in asked] == ["owner/name"] * 2
    assert asked[0][2] == {"revision": "v2"}
    errors[0] = LocalEntryNotFoundError("no connection")
    with pytest.raises(EnvironmentFault, match="cannot get 'transformers:owner/name@v2'"):
        preprocessing_of("owner/name@v2", {"image_size": 32}, False)


def test_a_folder_with_an_at_in_its_path(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "mine@home", "ViTModel")
    transformers.ViTImageProcessorPil(size=SQUARE, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    assert build_model(ModelSection(name=f"transformers:{folder}", pretrained=True)).pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
