"""Which layers lose neurons or heads together, and which modules are left alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import timm
import torch
from helpers import random_model
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.narrow import narrow
from lpvit_cli.pruning.coupling import Coupling, find_couplings
from lpvit_cli.recipe.prune import Layers


def pairs(model: nn.Module, patterns: Iterable[str], width: int = 8, **layers: Any) -> dict[str, Coupling]:
    return find_couplings(model, prunable_layers(model, Layers(**layers)), patterns, width)


def test_neurons_are_those_between_the_two_layers_of_an_mlp() -> None:
    found = pairs(random_model("vit"), ["neurons"], width=16)
    assert found == {
        f"blocks.{n}.mlp.fc2": Coupling(f"blocks.{n}.mlp", (f"blocks.{n}.mlp.fc1",), f"blocks.{n}.mlp.fc2", 16, 1, 32, False)
        for n in (0, 1)
    }
    assert found["blocks.0.mlp.fc2"].block == (32, 16)


@pytest.mark.parametrize(
    ("which", "blocks"), [("vit", ["blocks.0", "blocks.1"]), ("swin", ["layers.0.blocks.1", "layers.1.blocks.0"])]
)
def test_heads_are_those_of_the_attention_whatever_the_width(which: str, blocks: list[str]) -> None:
    found = pairs(random_model(which), ["heads"], width=7)
    for block in blocks:
        name = f"{block}.attn"
        out = 64 if block.startswith("layers.1") else 32
        assert found[f"{name}.proj"] == Coupling(name, (f"{name}.qkv",), f"{name}.proj", 8, 3, out, True)


def test_both_patterns_together() -> None:
    model = random_model("swin")
    both = pairs(model, ["neurons", "heads"])
    assert both == {**pairs(model, ["neurons"]), **pairs(model, ["heads"])}
    assert len(both) == 2 * 4


def test_a_head_is_in_three_places_of_the_rows_that_make_it() -> None:
    """Rows of qkv: all heads of q, then of k, then of v."""
    pair = Coupling("attn", ("attn.qkv",), "attn.proj", width=8, repeats=3, consumer_out=32, heads=True)
    mask = torch.tensor([[True, False, False, True]])
    assert pair.producer_mask(mask).tolist() == [[True], [False], [False], [True]] * 3
    assert pair.kept(mask).tolist() == [0, 3]


def test_a_group_of_neurons_is_kept_neuron_by_neuron() -> None:
    pair = Coupling("mlp", ("mlp.fc1",), "mlp.fc2", width=3, repeats=1, consumer_out=32, heads=False)
    mask = torch.tensor([[False, True, False, True]])
    assert pair.producer_mask(mask).tolist() == [[False], [True], [False], [True]]
    assert pair.kept(mask).tolist() == [3, 4, 5, 9, 10, 11]


@pytest.mark.parametrize("which", ["vit", "swin"])
def test_the_rows_that_a_mask_keeps_are_those_that_narrow_keeps(which: str) -> None:
    model = random_model(which)
    for pair in pairs(model, ["neurons", "heads"]).values():
        producer: Any = model.get_submodule(pair.producers[0])
        consumer: Any = model.get_submodule(pair.consumer)
        mask = torch.arange(consumer.in_features // pair.width)[None] % 3 == 1
        rows = pair.producer_mask(mask)[:, 0].repeat_interleave(pair.width)
        columns = mask[0].repeat_interleave(pair.width)
        expected: list[Tensor] = [producer.weight[rows], producer.bias[rows], consumer.weight[:, columns]]
        narrow(model.get_submodule(pair.module), pair.kept(mask))
        after: Any = [model.get_submodule(name) for name in (pair.producers[0], pair.consumer)]
        for got, want in zip([after[0].weight, after[0].bias, after[1].weight], expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("width", [3, 5, 256])
def test_groups_that_do_not_divide_the_neurons(width: int) -> None:
    with pytest.raises(UsageError, match=rf"groups of {width} do not divide the 128 of blocks.0.mlp.fc2") as caught:
        pairs(random_model("vit"), ["neurons"], width=width)
    assert "second number of prune.block" in caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("neurons", {"exclude": ("*.fc1",)}),
        ("neurons", {"include": ("*.attn.*",)}),
        ("heads", {"exclude": ("*.qkv",)}),
        ("heads", {"exclude": ("*.proj",)}),
    ],
)
def test_a_pair_needs_both_of_its_layers(pattern: str, layers: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"prune.patterns: {pattern}: no module of this model can lose {pattern} as a whole"):
        pairs(random_model("vit"), [pattern], **layers)


def test_pairs_whose_layers_are_chosen_are_found_beside_others() -> None:
    assert list(pairs(random_model("vit"), ["heads"], exclude=("blocks.0.attn.qkv",))) == ["blocks.1.attn.proj"]


def test_a_model_without_heads() -> None:
    """An MLP-Mixer mixes tokens by an MLP."""
    with torch.device("meta"):
        mixer = timm.create_model("mixer_s32_224", num_classes=3)
    with pytest.raises(UsageError, match="no module of this model can lose heads"):
        pairs(mixer, ["neurons", "heads"])
    assert len(pairs(mixer, ["neurons"])) == 16


@pytest.mark.parametrize(
    ("module", "pattern"),
    [
        (Mlp(16, 32, norm_layer=nn.LayerNorm), "neurons"),
        (Mlp(16, 32, use_conv=True), "neurons"),
        (Attention(16, 2, scale_norm=True, norm_layer=nn.LayerNorm), "heads"),
        (Attention(16, 2, gated=True), "heads"),
    ],
    ids=["MLP with a norm inside", "MLP of convolutions", "attention with a norm inside", "gated attention"],
)
def test_modules_where_something_else_holds_the_features_are_left_alone(module: nn.Module, pattern: str) -> None:
    """A norm over the hidden features, or a gate of their size, would have to be cut too."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([module, nn.Linear(2, 2)])})
    with pytest.raises(UsageError, match=f"can lose {pattern} as a whole"):
        pairs(model, [pattern])
