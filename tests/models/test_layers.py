"""Which layers are pruned by default, and that those which nobody calls are found, all of them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from helpers import relative
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature import collect
from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import called_layers, prunable_layers, require_called
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tasks.classification import Classification

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
WINDOWS = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "num_classes": 5}
BYPASSING = {  # what reads the weight of qkv without calling the layer, unless a switch is on
    "beit_base_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "swinv2_tiny_window8_256": WINDOWS,
}


def built(name: str) -> Any:
    """With biases that are not zero."""
    torch.manual_seed(0)
    model = build_model(ModelSection(name=name, kwargs=BYPASSING[name]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", BYPASSING)
def test_qkv_is_called_and_the_result_is_that_of_timm(name: str) -> None:
    model, origin = built(name), timm.create_model(name, **BYPASSING[name]).eval()
    origin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert relative(model(x), origin(x)) < 1e-6
    chosen = prunable_layers(model, Layers())
    assert sum(layer.endswith(".qkv") for layer in chosen) == 2
    require_called(chosen, called_layers(model, x))
    with pytest.raises(UsageError, match="2 of . layers are not called|2 of .. layers are not called") as caught:
        require_called(prunable_layers(origin, Layers()), called_layers(origin, x))
    assert caught.value.hint == "leave them out: --set 'prune.layers.exclude=[*.attn.qkv]'"


class Block(nn.Module):
    def __init__(self, bypass: bool):
        super().__init__()
        self.used, self.read, self.bypass = nn.Linear(6, 6), nn.Linear(6, 6), bypass

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + (F.linear(x, self.read.weight) if self.bypass else self.read(x))


class Net(nn.Module):
    def __init__(self, bypass: tuple[bool, ...], name: str = "blocks"):
        super().__init__()
        self.name, self.pretrained_cfg = name, {"input_size": (3, 2, 1)}
        setattr(self, name, nn.Sequential(*[Block(one) for one in bypass]))
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(getattr(self, self.name)(x.flatten(1)))


@pytest.mark.parametrize(
    ("bypass", "named", "globs"),
    [
        ((True, True), "2 of 4 layers .*: blocks.0.read, blocks.1.read", "*.read"),
        ((True, False), "1 of 4 layers .*: blocks.0.read", "blocks.0.read"),  # the other one is called
        ((True,) * 5, "5 of 10 layers .*: blocks.0.read, blocks.1.read, blocks.2.read and 2 more", "*.read"),
    ],
)
def test_all_layers_that_nobody_calls_are_named_before_anything_is_counted(
    bypass: tuple[bool, ...], named: str, globs: str
) -> None:
    model, seen = Net(bypass), []
    batches = [(torch.randn(4, 3, 2, 1), torch.zeros(4, dtype=torch.int64))] * 2
    loss = Classification().loss("sampled", 0)
    with pytest.raises(UsageError, match=f"prune.layers: {named}$") as caught:
        collect(model, prunable_layers(model, Layers()), batches, loss, torch.device("cpu"), seen.append)
    assert caught.value.hint == f"leave them out: --set 'prune.layers.exclude=[{globs}]'"
    assert not seen
    rest = prunable_layers(model, Layers(exclude=(globs,)))
    assert set(collect(model, rest, batches, loss, torch.device("cpu"), seen.append)) == set(rest)
    assert seen == [4, 8]


def test_without_blocks_by_name_all_that_is_called_but_for_the_output() -> None:
    model = Net((False, False), name="stages")
    assert list(prunable_layers(model, Layers())) == [f"stages.{n}.{layer}" for n in (0, 1) for layer in ("used", "read")]
    assert list(prunable_layers(model, Layers(exclude=("*.read",)))) == ["stages.0.used", "stages.1.used"]
    assert list(prunable_layers(model, Layers(include=("head",)))) == ["head"]
    with pytest.raises(UsageError, match="no linear layer matches"):
        prunable_layers(model, Layers(exclude=("*",)))


def test_layers_that_see_no_image_are_left_out_by_default() -> None:
    model = built("swinv2_tiny_window8_256")
    assert not [name for name in prunable_layers(model, Layers()) if "cpb_mlp" in name]
    assert [name for name in prunable_layers(model, Layers(include=("*.cpb_mlp.*",))) if "cpb_mlp" in name]


@pytest.mark.parametrize(("name", "kwargs"), [("coatnet_rmlp_nano_rw_224", {"depths": (1, 1, 1, 1)}), ("efficientvit_m0", {})])
def test_a_model_of_convolutions_is_refused(name: str, kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model(ModelSection(name=name, kwargs=kwargs))
        with pytest.raises(UsageError, match="have no linear layers that it calls"):
            prunable_layers(model, Layers())
