"""Dense models: names and arguments that are refused, preprocessing, prunable layers, small copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import FC1, KWARGS, VIT, images, one_line, tiny

from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import build_model, shrink
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers


def test_a_model_is_built_for_inference_with_random_weights() -> None:
    model = tiny()
    assert not any(module.training for module in model.modules())
    assert model(images()).shape == (3, 5)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tiny_patch16_244", "vit_tiny_patch16_224"),
        ("levit_129.fb_dist_in1k", "levit_128"),
        ("swin_tiny_patch4_window7", "swin_tiny_patch4_window7_224"),
    ],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_name_brings_up_close_ones(name: str, near: str, pretrained: bool) -> None:
    with pytest.raises(UsageError, match=f"model.name: timm has no model '{name}'") as caught:
        build_model(ModelSection(name=name, pretrained=pretrained))
    assert caught.value.hint.startswith("did you mean ")
    assert near in caught.value.hint


def test_a_name_like_no_other() -> None:
    with pytest.raises(UsageError, match="timm has no model 'zzzqqq'") as caught:
        build_model(ModelSection(name="zzzqqq"))
    assert "timm.list_models()" in caught.value.hint


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_unknown_tag_is_a_wrong_name(pretrained: bool) -> None:
    with pytest.raises(UsageError, match="model.name.*nonsense"):
        build_model(ModelSection(name=f"{VIT}.nonsense", pretrained=pretrained))


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"depht": 2}, "depht"),
        ({"embed_dim": 33, "num_heads": 2}, "divisible"),
        ({"img_size": "big"}, "str"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=f"model.kwargs: timm cannot build '{VIT}'.*{reason}") as caught:
        build_model(ModelSection(name=VIT, kwargs=kwargs))
    assert "model.kwargs" in caught.value.hint


def test_there_is_no_output_to_choose() -> None:
    with pytest.raises(UsageError, match="model.output: 0, but models of timm give one tensor") as caught:
        build_model(ModelSection(name=VIT, kwargs=KWARGS, output=0))
    one_line(caught.value)


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(UsageError, match="'test_resnet' has no linear layers") as caught:
        build_model(ModelSection(name="test_resnet", kwargs={"num_classes": 0}))
    assert "vision transformer" in caught.value.hint


@pytest.mark.parametrize(
    "section",
    [
        {"name": VIT, "pretrained": True},
        {"name": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"},
        {"name": "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "pretrained": True},
    ],
)
def test_pretrained_weights_without_a_network(section: dict[str, Any]) -> None:
    with pytest.raises(
        EnvironmentFault, match="model.name: cannot get the pretrained weights of '" + section["name"]
    ) as caught:
        build_model(ModelSection(**section))
    one_line(caught.value)
    assert "--set model.weights=" in caught.value.hint


@pytest.mark.parametrize(
    ("kwargs", "size"),
    [
        ({}, (3, 224, 224)),
        ({"img_size": 48}, (3, 48, 48)),
        ({"img_size": (32, 48)}, (3, 32, 48)),
        ({"img_size": [48, 32]}, (3, 48, 32)),
    ],
)
def test_images_have_the_size_the_model_is_built_for(kwargs: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = build_model(ModelSection(name=VIT, kwargs={**kwargs, "depth": 1}))
    assert tuple(model.pretrained_cfg["input_size"]) == size
    image = transform_for(model)(Image.new("RGB", (300, 260)))
    assert image.shape == size
    assert model(image[None]).shape == (1, 1000)


@pytest.mark.parametrize(
    "overrides",
    [
        {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        {"crop_pct": 0.5},
        {"interpolation": "nearest"},
        {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "interpolation": "bilinear"},
    ],
)
def test_preprocess_replaces_what_it_names_only(overrides: dict[str, Any]) -> None:
    model = build_model(ModelSection(name=VIT, kwargs=KWARGS, preprocess=overrides))  # type: ignore[arg-type]
    timms = tiny().pretrained_cfg
    assert timms["mean"] == (0.5, 0.5, 0.5), "one model's preprocessing became another's"
    assert model.pretrained_cfg == {**timms, **overrides}


@pytest.mark.parametrize("size", [(3, 48, 32), (1, 32, 32)])
def test_a_size_that_the_model_does_not_take(size: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match=r"an image of \[\d, \d\d, 32\] does not go through it") as caught:
        build_model(ModelSection(name=VIT, kwargs=KWARGS, preprocess={"input_size": size}))  # type: ignore[arg-type]
    assert "model.preprocess.input_size" in caught.value.hint
    one_line(caught.value)


def test_preprocess_changes_the_pixels() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    overrides = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.5, "interpolation": "nearest"}
    model = build_model(ModelSection(name=VIT, kwargs=KWARGS, preprocess=overrides))  # type: ignore[arg-type]
    expected = (pixels[16:48, 16:48] / 255 - overrides["mean"]) / overrides["std"]
    got = transform_for(model)(Image.fromarray(pixels)).numpy()
    assert np.abs(got - expected.transpose(2, 0, 1)).max() < 1e-5


ALL = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({}, ALL),
        ({"exclude": ("*.qkv", "*.proj")}, [name for name in ALL if "mlp" in name]),
        ({"exclude": ("blocks.0.*",)}, ALL[4:]),
        ({"include": ("*.fc1", "head"), "exclude": ("blocks.1.*",)}, [FC1, "head"]),
        ({"include": (FC1,)}, [FC1]),
        ({"include": ("*",)}, [*ALL, "head"]),
        ({"include": ("blocks.?.attn.*",)}, [name for name in ALL if "attn" in name]),
    ],
)
def test_layers_are_chosen_by_glob(globs: dict[str, Any], expected: list[str]) -> None:
    model = tiny()
    chosen = prunable_layers(model, Layers(**globs))
    assert list(chosen) == expected
    assert all(module is model.get_submodule(name) for name, module in chosen.items())


def test_layers_of_a_hierarchical_model_are_found() -> None:
    with torch.device("meta"):
        model = build_model(ModelSection(name="swin_tiny_patch4_window7_224", kwargs={"depths": (1, 1, 1, 1)}))
    chosen = prunable_layers(model, Layers())
    assert {name.split(".blocks.0.")[0] for name in chosen} == {f"layers.{i}" for i in range(4)}
    assert len(chosen) == 16


@pytest.mark.parametrize(
    "globs", [{"include": ("nothing.*",)}, {"exclude": ("*",)}, {"include": ()}, {"include": ("Blocks.*",)}]
)
def test_globs_that_match_nothing(globs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="prune.layers: no linear layer matches") as caught:
        prunable_layers(tiny(), Layers(**globs))
    assert all(glob in caught.value.message for globs_of_one_key in globs.values() for glob in globs_of_one_key)
    assert "blocks.0.attn.qkv" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        (VIT, {"num_classes": 3}, (64, 64)),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"num_classes": 3}, (64, 64)),
        ("swin_tiny_patch4_window7_224", {"num_classes": 3}, (64, 64)),
        ("deit_base_patch16_224", {"num_classes": 3}, (64, 64)),
        (VIT, {"num_classes": 3, "img_size": 32, "patch_size": 8}, (32, 32)),
        (VIT, {"num_classes": 3, "img_size": (32, 48), "patch_size": 8}, None),
        (VIT, {"num_classes": 3, "img_size": [96, 96]}, (64, 64)),
    ],
)
def test_a_small_copy_builds_and_runs(name: str, kwargs: dict[str, Any], size: tuple[int, int] | None) -> None:
    architecture, small = shrink(ModelSection(name=name, kwargs=kwargs, pretrained=True))
    assert architecture == name.split("/")[-1]
    model = build_model(ModelSection(name=architecture, kwargs=small))
    height, width = model.pretrained_cfg["input_size"][1:]
    assert size is None or (height, width) == size
    assert max(height, width) <= 64
    logits = model(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 3)
    assert bool(logits.isfinite().all())
    blocks = {layer.split(".attn")[0].split(".mlp")[0] for layer in prunable_layers(model, Layers())}
    assert len(blocks) == (4 if "swin" in name else 2)
    assert {key: small[key] for key in kwargs if key != "img_size"} == {k: v for k, v in kwargs.items() if k != "img_size"}


@pytest.mark.parametrize("section", [{"name": "zzzqqq"}, {"name": VIT, "kwargs": {"depht": 2}}])
def test_what_cannot_be_built_is_explained_by_building_it(section: dict[str, Any]) -> None:
    architecture, kwargs = shrink(ModelSection(**section))
    assert (architecture, kwargs) == (section["name"], section.get("kwargs", {}))
    with pytest.raises(UsageError, match="timm (has no model|cannot build)"):
        build_model(ModelSection(name=architecture, kwargs=kwargs))
