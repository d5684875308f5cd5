"""Pruning in sequence where tokens are merged: both models merge the same ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import expanded, relative
from torch import Tensor, nn

from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.merging import merge_tokens
from lpvit_cli.pruning.block_obs import DAMPING
from lpvit_cli.pruning.blocks import grid
from lpvit_cli.pruning.replay import blocks_of
from lpvit_cli.pruning.sequential import Pruning, Target, prune_sequentially
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.tokens.blocks import Merging
from lpvit_cli.tokens.merge import TokenMerge

KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
BLOCK, LAST = (8, 8), "blocks.2.mlp.fc1"


@pytest.fixture(params=[False, True], ids=["class token", "all tokens"])
def model(request: pytest.FixtureRequest) -> Any:
    dense = build_model(ModelSection(name="vit_tiny_patch16_224", kwargs=KWARGS))
    generator = torch.Generator().manual_seed(0)
    for parameter in dense.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return merge_tokens(dense, Merging(fraction=0.3, after=(0, 1), prefix=1, restores=request.param))


def images() -> list[Tensor]:
    return list(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(4))


def pruned(model: nn.Module, fraction: float) -> tuple[nn.Module, dict[str, Tensor]]:
    made, targets, weights = copy.deepcopy(model), {}, {}
    for name, layer in prunable_layers(model, Layers()).items():
        costs = torch.ones(grid((layer.out_features, layer.in_features), BLOCK), dtype=torch.float64)
        targets[name] = Target(BLOCK, costs, costs.numel() - round(fraction * costs.numel()))
        weights[name] = torch.eye(layer.out_features)
    (masks,) = prune_sequentially(model, [Pruning(made, targets, weights)], images(), lambda _: None)
    return made, masks


def inputs(model: nn.Module, name: str, like: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
    """What the layer is given, and what each merge is; with `like`, of another model, merges follow that."""
    seen, merges = [], []
    others = iter(like or [])

    def follow(_: nn.Module, args: Any, kwargs: Any) -> Any:
        merges.append(args[0])
        return args, {**kwargs, "like": next(others)} if like else kwargs

    handles = [
        part.register_forward_pre_hook(follow, with_kwargs=True) for part in model.modules() if isinstance(part, TokenMerge)
    ]
    handles.append(model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2))))
    with torch.no_grad():
        for x in images():
            model(x)
    for handle in handles:
        handle.remove()
    return torch.cat(seen).double(), merges


def test_merges_are_blocks_of_the_row(model: Any) -> None:
    names = [block.name for block in blocks_of(model, prunable_layers(model, Layers()), images()[0])]
    assert names == ["blocks.0", "blocks.0.merge", "blocks.1", "blocks.1.merge", "blocks.2"]


def test_nothing_removed_changes_nothing(model: Any) -> None:
    made, _ = pruned(model, 0.0)
    assert relative(made(images()[0]), model(images()[0])) < 1e-4


def test_kept_weights_solve_the_normal_equations_of_the_same_merges(model: Any) -> None:
    made, masks = pruned(model, 0.6)
    x, like = inputs(model, LAST)
    x_pruned, _ = inputs(made, LAST, like)
    own, _ = inputs(made, LAST)
    assert relative(own, x_pruned) > 0.01, "the pruned model alone merges other tokens"
    w, new = (one.get_submodule(LAST).weight.detach().double() for one in (model, made))
    elements = expanded(masks[LAST], tuple(w.shape), BLOCK)
    damping = DAMPING * x_pruned.square().sum(0).mean() * torch.eye(w.shape[1], dtype=torch.float64)
    left = new @ (x_pruned.T @ x_pruned + damping)
    right = w @ (x.T @ x_pruned + damping)
    assert relative(left[elements], right[elements]) < 1e-4
