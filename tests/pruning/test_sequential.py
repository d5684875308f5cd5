"""Sequential pruning against least squares on the inputs themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import expanded, relative
from torch import Tensor, nn

from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning import sequential
from lpvit_cli.pruning.block_obs import DAMPING
from lpvit_cli.pruning.blocks import block_elements, grid
from lpvit_cli.pruning.sequential import Pruning, Target, prune_sequentially
from lpvit_cli.recipe.prune import Layers

BLOCK = (8, 16)
LAST = "blocks.1.mlp.fc2"


def images() -> list[Tensor]:
    return list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(10))


def count_target(layer: nn.Linear, removed: int, block: tuple[int, int] = BLOCK) -> Target:
    """So many blocks, whatever their size."""
    costs = torch.ones(grid((layer.out_features, layer.in_features), block), dtype=torch.float64)
    return Target(block, costs, costs.numel() - removed)


def pruned(model: nn.Module, fraction: float) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    layers = prunable_layers(model, Layers())
    counts = {}
    for name, layer in layers.items():
        rows, columns = grid((layer.out_features, layer.in_features), BLOCK)
        counts[name] = round(fraction * rows * columns)
    weights = {name: torch.diag(torch.rand(layer.out_features)) for name, layer in layers.items()}
    made, told = copy.deepcopy(model), []
    targets = {name: count_target(layers[name], count) for name, count in counts.items()}
    masks = prune_sequentially(model, [Pruning(made, targets, weights)], images(), told.append)[0]
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


def test_tokens_weigh_what_they_are_given(tiny_vit: nn.Module) -> None:
    """The normal equations as above, each token times 10/11 of its weight in a mean of one, and 1/11."""
    layers, generator = prunable_layers(tiny_vit, Layers()), torch.Generator().manual_seed(4)
    given = {name: [torch.rand(17 * len(x), generator=generator) ** 4 for x in images()] for name in layers}
    given[LAST] = given[LAST][:1]  # not known for every batch: all tokens of this layer weigh the same
    targets = {name: count_target(layer, 3) for name, layer in layers.items()}
    outputs, made = {name: torch.eye(layer.out_features) for name, layer in layers.items()}, copy.deepcopy(tiny_vit)
    masks = prune_sequentially(tiny_vit, [Pruning(made, targets, outputs, given)], images(), lambda name: None)[0]
    for name in ("blocks.0.mlp.fc2", "blocks.1.attn.qkv", LAST):
        x, x_pruned = inputs(tiny_vit, name), inputs(made, name)
        weights = torch.cat(given[name]).double()
        weights = torch.ones(len(x)).double() if name == LAST else (10 * weights / weights.mean() + 1) / 11
        w, new = tiny_vit.get_submodule(name).weight.detach().double(), made.get_submodule(name).weight.detach().double()
        elements = expanded(masks[name], tuple(w.shape), BLOCK)
        weighted = x_pruned * weights[:, None]
        damping = DAMPING * (weighted * x_pruned).sum(0).mean() * torch.eye(w.shape[1], dtype=torch.float64)
        left, right = new @ (x_pruned.T @ weighted + damping), w @ (x.T @ weighted + damping)
        assert relative(left[elements], right[elements]) < 1e-4


def test_layers_that_lose_nothing_make_up_for_earlier_errors(tiny_vit: nn.Module) -> None:
    """Ridge regression of the dense outputs on the pruned inputs, from the dense weight."""
    layers = prunable_layers(tiny_vit, Layers())
    targets = {name: count_target(layer, 6) if "blocks.0" in name else None for name, layer in layers.items()}
    outputs, made = {name: torch.eye(layer.out_features) for name, layer in layers.items()}, copy.deepcopy(tiny_vit)
    told: list[str] = []
    masks = prune_sequentially(tiny_vit, [Pruning(made, targets, outputs)], images(), told.append)[0]
    assert list(masks) == [name for name in layers if "blocks.0" in name]
    assert told == list(layers)
    for name in ("blocks.1.attn.proj", LAST):
        x, x_pruned = inputs(tiny_vit, name), inputs(made, name)
        w, new = tiny_vit.get_submodule(name).weight.detach().double(), made.get_submodule(name).weight.detach().double()
        damping = DAMPING * x_pruned.square().sum(0).mean() * torch.eye(w.shape[1], dtype=torch.float64)
        assert relative(new @ (x_pruned.T @ x_pruned + damping), w @ (x.T @ x_pruned + damping)) < 1e-4
        assert relative(new, w) > 1e-3


def test_blocks_that_are_zero_go_first_and_stay_zero(tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a later step of gradual pruning, even where the first layer loses most and all others make up for it."""
    layers, generator = prunable_layers(tiny_vit, Layers()), torch.Generator().manual_seed(5)
    gone = {}
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        gone[name] = torch.rand(grid(shape, BLOCK), generator=generator) < 0.4
        sizes = 10 ** (-4 * torch.rand(gone[name].shape, generator=generator))  # some that stay are next to nothing
        layer.weight.data *= expanded(sizes * ~gone[name], shape, BLOCK)
    counts = {name: int(mask.sum()) for name, mask in gone.items()} | {
        "blocks.0.attn.qkv": gone["blocks.0.attn.qkv"].numel() - 1
    }
    targets = {name: count_target(layer, counts[name]) for name, layer in layers.items()}
    outputs, made = {name: torch.eye(layer.out_features) for name, layer in layers.items()}, copy.deepcopy(tiny_vit)
    judged: list[Tensor] = []
    order = sequential.removal_order
    monkeypatch.setattr(sequential, "removal_order", lambda weight, *more: judged.append(weight) or order(weight, *more))
    masks = prune_sequentially(tiny_vit, [Pruning(made, targets, outputs)], images(), lambda name: None)[0]
    for (name, mask), weight in zip(masks.items(), judged, strict=True):
        assert not weight[expanded(gone[name], tuple(weight.shape), BLOCK)].any(), "what has gone was refitted"
        assert not (mask & gone[name]).any()
        assert int((~mask).sum()) == counts[name]


# budgets at ragged edges


@pytest.mark.parametrize("balanced", [False, True])
def test_blocks_go_until_what_is_left_costs_no_more_than_asked(tiny_vit: nn.Module, balanced: bool) -> None:
    """Blocks of 20 x 12 do not divide the layers: their edges hold blocks of half the weights and less."""
    layers, block = prunable_layers(tiny_vit, Layers()), (20, 12)
    targets, units = {}, {}
    for name, layer in layers.items():
        elements = block_elements((layer.out_features, layer.in_features), block)
        targets[name] = Target(block, elements, 0.55 * float(elements.sum()), balanced)
        units[name] = float(elements[:, 0].sum() if balanced else elements.max())
    weights = {name: torch.eye(layer.out_features) for name, layer in layers.items()}
    made = copy.deepcopy(tiny_vit)
    masks = prune_sequentially(tiny_vit, [Pruning(made, targets, weights)], images(), lambda name: None)[0]
    spare = 0.0
    for name, target in targets.items():
        left = float(made.get_submodule(name).weight.count_nonzero())
        assert left == target.costs[masks[name]].sum()
        assert not balanced or len(set(masks[name].sum(dim=1).tolist())) == 1, "as many blocks in every block row"
        spare += target.kept - left
        assert 0 <= spare < units[name], "what a layer cannot keep of its share in whole blocks, the next one may"


# models that are not what they should be


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(torch.relu(self.shared(x))))


def test_a_layer_that_is_called_twice_is_pruned_once_for_its_first_call() -> None:
    model, block = Twice(), (8, 4)
    layers = {"shared": model.shared, "last": model.last}
    targets = {name: count_target(layer, 2, block) for name, layer in layers.items()}
    batches = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (40, 30)]
    made, told = copy.deepcopy(model), []
    weights = {name: torch.eye(layer.out_features) for name, layer in layers.items()}
    masks = prune_sequentially(model, [Pruning(made, targets, weights)], batches, told.append)[0]
    assert told == list(masks) == ["shared", "last"]
    x = torch.cat(batches).double()
    w, new = model.shared.weight.detach().double(), made.shared.weight.detach().double()
    elements = expanded(masks["shared"], (16, 16), block)
    assert int(elements.sum()) == 16 * 16 - 2 * 8 * 4
    assert not new[~elements].any()
    gram = x.T @ x + DAMPING * x.square().sum(0).mean() * torch.eye(16, dtype=torch.float64)
    assert relative((new @ gram)[elements], (w @ gram)[elements]) < 1e-5, "the dense weight is the target, not a pruned one"


class Broken(Exception):
    pass


def fail_at(model: nn.Module, name: str, batch: int) -> None:
    """Raises before this module runs on a batch of this many images."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) == batch:
            raise Broken(name)

    model.get_submodule(name).register_forward_pre_hook(hook)


def run_broken(dense: nn.Module, model: nn.Module, on_layer: Callable[[str], None] = lambda name: None) -> list[str]:
    """Prune until it breaks; the layers that were done. No hook is left, and every block is where it was."""
    layers = prunable_layers(dense, Layers())
    targets = {name: count_target(layer, 3) for name, layer in layers.items()}
    weights = {name: torch.eye(layer.out_features) for name, layer in layers.items()}
    before, done = [dict(one.named_modules()) for one in (dense, model)], []

    def note(name: str) -> None:
        done.append(name)
        on_layer(name)

    with pytest.raises((Broken, KeyboardInterrupt)):
        prune_sequentially(dense, [Pruning(model, targets, weights)], images(), note)
    for one, modules in zip((dense, model), before, strict=True):
        assert dict(one.named_modules()) == modules
        assert not any(one.get_submodule(name)._forward_pre_hooks for name in layers)
    return done


@pytest.mark.parametrize("batch", [10, 4], ids=["first batch", "last batch"])
@pytest.mark.parametrize("broken", ["dense", "pruned"])
def test_an_error_of_the_model_reaches_the_caller(tiny_vit: nn.Module, broken: str, batch: int) -> None:
    made = copy.deepcopy(tiny_vit)
    fail_at(tiny_vit if broken == "dense" else made, "blocks.1.norm2", batch)
    assert run_broken(tiny_vit, made)[-1] == "blocks.1.attn.proj"


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
def test_an_interrupt_ends_all_waiting_passes(tiny_vit: nn.Module, name: str) -> None:
    def interrupt(done: str) -> None:
        if done == name:
            raise KeyboardInterrupt

    assert run_broken(tiny_vit, copy.deepcopy(tiny_vit), interrupt)[-1] == name


def test_an_error_before_the_first_layer(tiny_vit: nn.Module) -> None:
    made = copy.deepcopy(tiny_vit)
    fail_at(tiny_vit, "patch_embed", 10)
    assert run_broken(tiny_vit, made) == []
