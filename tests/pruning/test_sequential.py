"""Sequential pruning against least squares on the inputs themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import expanded, relative
from torch import Tensor, nn

from lpvit_cli.models import prunable_layers
from lpvit_cli.pruning.blocks import grid
from lpvit_cli.pruning.sequential import Target, prune_sequentially
from lpvit_cli.pruning.surgeon import DAMPING
from lpvit_cli.recipe import Layers

BLOCK = (8, 16)
LAST = "blocks.1.mlp.fc2"


def images() -> list[Tensor]:
    return list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(10))


def pruned(model: nn.Module, fraction: float) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    layers = prunable_layers(model, Layers())
    counts = {}
    for name, layer in layers.items():
        rows, columns = grid((layer.out_features, layer.in_features), BLOCK)
        counts[name] = round(fraction * rows * columns)
    weights = {name: torch.diag(torch.rand(layer.out_features)) for name, layer in layers.items()}
    made, told = copy.deepcopy(model), []
    targets = {name: Target(BLOCK, count) for name, count in counts.items()}
    masks = prune_sequentially(model, made, targets, weights, images(), told.append)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == counts
    return made, masks, told


def inputs(model: nn.Module, name: str) -> Tensor:
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, i: seen.append(i[0].detach().flatten(0, -2)))
    with torch.no_grad():
        for x in images():
            model(x)
    handle.remove()
    return torch.cat(seen).double()


def test_nothing_removed_changes_nothing(tiny_vit: nn.Module) -> None:
    made, masks, told = pruned(tiny_vit, 0.0)
    assert told == list(masks) == list(prunable_layers(tiny_vit, Layers()))
    x = images()[0]
    assert relative(made(x), tiny_vit(x)) < 1e-4


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", LAST])
def test_kept_weights_solve_the_normal_equations_of_the_pruned_inputs(tiny_vit: nn.Module, name: str) -> None:
    """(X'^T X' + a I)_KK W'_K^T = (X'^T X + a I)_K W^T with a the damping, X and X' what dense and pruned model feed it."""
    made, masks, _ = pruned(tiny_vit, 0.4)
    x, x_pruned = inputs(tiny_vit, name), inputs(made, name)
    w, new = tiny_vit.get_submodule(name).weight.detach().double(), made.get_submodule(name).weight.detach().double()
    elements = expanded(masks[name], tuple(w.shape), BLOCK)
    assert not new[~elements].any()
    damping = DAMPING * x_pruned.square().sum(0).mean() * torch.eye(w.shape[1], dtype=torch.float64)
    left = new @ (x_pruned.T @ x_pruned + damping)
    right = w @ (x.T @ x_pruned + damping)
    assert relative(left[elements], right[elements]) < 1e-4


def test_later_layers_make_up_for_earlier_errors(tiny_vit: nn.Module) -> None:
    """The last layer's output is nearer to the dense one than with its own weights compensated for unpruned inputs."""
    made, masks, _ = pruned(tiny_vit, 0.4)
    x, x_pruned = inputs(tiny_vit, LAST), inputs(made, LAST)
    w, new = (model.get_submodule(LAST).weight.detach().double() for model in (tiny_vit, made))
    blind = torch.zeros_like(w)
    h = x.T @ x
    for i, row in enumerate(expanded(masks[LAST], tuple(w.shape), BLOCK)):
        kept = row.nonzero()[:, 0]
        if len(kept):
            blind[i, kept] = torch.linalg.lstsq(h[kept[:, None], kept], h[kept] @ w[i]).solution
    target = x @ w.T
    assert (x_pruned @ new.T - target).norm() < 0.98 * (x_pruned @ blind.T - target).norm()
