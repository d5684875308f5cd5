"""Trimmed models against the same ones untrimmed: nothing but their size changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODELS, SWIN, VIT, masked, random_model, relative
from lpvit_kernels import BlockSparseMatrix
from timm.layers import Mlp
from timm.models import create_model
from torch import Tensor, nn

from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.trim import trim
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import fuse, sparse_layers, sparsify

BLOCK = (8, 16)  # the heads have 8 features: they go in pairs


def holey(model: nn.Module, **empty: list[int]) -> nn.Module:
    """Float64 and sparse: random holes, and whole block rows (`rows_of_fc1`, ...) or block columns (`columns_of_fc2`, ...)."""
    masks = {}
    for seed, (name, layer) in enumerate(prunable_layers(model, Layers()).items()):
        _, masks[name] = masked((layer.out_features, layer.in_features), BLOCK, 0.8, seed)
        masks[name][:, 0] = masks[name][0] = True  # else a line may be empty by chance
        for key, lines in empty.items():
            dimension, _, kind = key.split("_")
            if name.endswith(kind):
                masks[name].index_fill_(int(dimension == "columns"), torch.tensor(lines), False)
    sparsify(model, masks, BLOCK)
    return model.double()  # trimming adds constants to biases, which rounds


def logits(model: nn.Module) -> Tensor:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.double()(x.double())


def sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: layer.weight.shape for name, layer in sparse_layers(model).items()}


CASES: dict[str, tuple[dict[str, list[int]], list[str]]] = {
    "neurons that nothing reads": ({"columns_of_fc2": [1]}, ["mlp"]),
    "neurons that never change": ({"rows_of_fc1": [2, 3]}, ["mlp"]),
    "half a group of neurons": ({"rows_of_fc1": [3]}, []),
    "a group gone for both reasons": ({"rows_of_fc1": [2, 3], "columns_of_fc2": [1, 2]}, ["mlp"]),
    "heads that nothing reads": ({"columns_of_proj": [1]}, ["attn"]),
    "heads whose values never change": ({"rows_of_qkv": [8, 9]}, ["attn"]),  # of 3 x 4 block rows; as rows of q they mean more
    "queries only": ({"rows_of_qkv": [0, 1]}, []),
    "nothing": ({}, []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", [name for name in MODELS if name != "swin"])
def test_what_has_no_purpose_goes_and_no_output_changes(which: str, case: str) -> None:
    empty, smaller = CASES[case]
    model = holey(random_model(which), **empty)
    trimmed = trim(model)
    assert relative(logits(trimmed), logits(model)) < 1e-12
    before, after = sizes(model), sizes(trimmed)
    shrunk = {name for name in before if after[name] != before[name]}
    assert shrunk == {name for name in before if any(part in name for part in smaller)}
    if which == "vit without a qkv bias" and case == "heads whose values never change":
        assert trimmed.blocks[0].attn.proj.bias is None


@pytest.mark.parametrize("empty", [{"columns_of_fc2": [0, 3]}, {"columns_of_proj": [0]}, {"rows_of_fc1": [0, 1]}], ids=str)
def test_swin(empty: dict[str, list[int]]) -> None:
    model = holey(random_model("swin"), **empty)
    trimmed = trim(model)
    assert relative(logits(trimmed), logits(model)) < 1e-12
    assert sizes(trimmed) != sizes(model)


def test_constants_stay_where_no_bias_can_take_them() -> None:
    mlp = Mlp(32, 64, bias=(True, False))
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[:2] = False
    sparsify(mlp, {"fc1": mask, "fc2": torch.ones(4, 4, dtype=torch.bool)}, BLOCK)
    assert trim(mlp).fc1.out_features == 64
    nn.init.zeros_(mlp.fc1.bias)  # GELU(0) is 0: nothing to take
    trimmed, x = trim(mlp), torch.randn(5, 32)
    assert trimmed.fc1.out_features == 48
    assert relative(trimmed(x), mlp(x)) < 1e-6


def test_one_group_stays_of_a_module_that_does_nothing() -> None:
    model = holey(random_model("vit"), columns_of_fc2=[0, 1, 2, 3, 4, 5, 6, 7])
    trimmed = trim(model)
    assert trimmed.blocks[0].mlp.fc1.out_features == 16
    assert relative(logits(trimmed), logits(model)) < 1e-12


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {**VIT, "scale_attn_norm": True, "scale_mlp_norm": True}),
        ("swin_tiny_patch4_window7_224", {**SWIN, "embed_dim": 24, "num_heads": (3, 3)}),  # 24 features, groups of 16
    ],
)
def test_left_alone(name: str, kwargs: dict[str, Any]) -> None:
    model = holey(create_model(name, **kwargs).eval(), columns_of_fc2=[0], columns_of_proj=[0])
    for layer, size in sizes(trim(model)).items():
        assert size == sizes(model)[layer] or (name.startswith("swin") and not layer.startswith("layers.0.blocks.0.attn"))


def test_kept_blocks_stay_whole_and_the_original_is_untouched() -> None:
    model = holey(random_model("vit"), columns_of_fc2=[1, 2])
    before = copy.deepcopy(model.state_dict())
    trimmed = trim(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    weight: BlockSparseMatrix = trimmed.blocks[0].mlp.fc2.weight
    assert len(weight.cols) == len(model.blocks[0].mlp.fc2.weight.cols)
    assert weight.block == BLOCK


def test_a_trimmed_model_is_fused_saved_and_loaded(tmp_path: Path) -> None:
    model = holey(random_model("vit"), columns_of_fc2=[1], columns_of_proj=[1])
    trimmed = trim(model)
    assert relative(logits(fuse(trimmed)), logits(model)) < 1e-12
    config = {
        "architecture": MODELS["vit"][0],
        "kwargs": MODELS["vit"][1],
        "num_classes": 5,
        "preprocessing": {"input_size": (3, 32, 32)},
    }
    save_model(tmp_path, trimmed, config)
    loaded = load_model(tmp_path)
    assert sizes(loaded) == sizes(trimmed) != sizes(model)
    assert relative(logits(loaded), logits(model)) < 1e-12


def holey_mlp(**more: Any) -> Any:
    """The first group of neurons never changes: GELU of its bias."""
    mlp = Mlp(32, 64, **more)
    mask = torch.ones(8, 2, dtype=torch.bool)
    mask[:2] = False
    sparsify(mlp, {"fc1": mask, "fc2": torch.ones(4, 4, dtype=torch.bool)}, BLOCK)
    return mlp.eval()


def test_constants_reach_no_other_layer_that_shares_the_bias() -> None:
    model, x = nn.Sequential(holey_mlp(), nn.Linear(32, 32)), torch.randn(5, 32)
    model[1].bias = model[0].fc2.bias
    trimmed = trim(model)
    assert trimmed[0].fc1.out_features == 48
    assert relative(trimmed(x), model(x)) < 1e-6
    assert trim(model.requires_grad_(False))[0].fc2.bias.requires_grad is False


def test_an_infinite_bias_that_nothing_reads_adds_nothing() -> None:
    mlp, x = holey_mlp(), torch.randn(5, 32)
    mlp.fc2 = sparse_columns(mlp.fc2, 1)
    mlp.fc1.bias.data[:16] = torch.inf
    trimmed = trim(mlp)
    assert trimmed.fc1.out_features == 48
    assert relative(trimmed(x), mlp(x)) < 1e-6


def sparse_columns(layer: Any, empty: int) -> Any:
    """The same layer, the first `empty` block columns gone."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, :empty] = False
    return type(layer)(BlockSparseMatrix.from_dense(layer.weight.to_dense().detach(), BLOCK, mask), layer.bias)


def test_an_activation_in_place_leaves_the_bias_alone() -> None:
    mlp, x = holey_mlp(act_layer=lambda: nn.ReLU(inplace=True)), torch.randn(5, 32)
    nn.init.constant_(mlp.fc1.bias, -1.0)
    assert relative(trim(mlp)(x), mlp(x)) < 1e-6


def test_layers_used_twice_stay_whole() -> None:
    mlp, x = holey_mlp(), torch.randn(5, 32)
    other = copy.deepcopy(mlp)
    other.fc2 = mlp.fc2
    model = nn.Sequential(mlp, other)
    trimmed = trim(model)
    assert trimmed[0].fc2 is trimmed[1].fc2
    assert relative(trimmed(x), model(x)) < 1e-6
