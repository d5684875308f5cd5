"""Scores and weights made of single images' gradients, against Fisher matrices formed and inverted whole in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import relative, run_cli
from torch import Tensor, nn

from lpvit_cli import load_model
from lpvit_cli.curvature import ImageGradients, collect, single_images
from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.blocks import expand, grid
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.methods.fisher import block_fisher, block_scores
from lpvit_cli.pruning.methods.mfac import mfac_compensated, mfac_saliency
from lpvit_cli.pruning.plan import Plan, build_plan
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.prune import Budget, Layers, PruneSection
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.tasks.classification import Classification, calibration_loss

CPU = torch.device("cpu")
DAMPING = 0.3
CASES = [((12, 16), (4, 4)), ((12, 16), (12, 4)), ((10, 15), (4, 6)), ((7, 5), (1, 1)), ((6, 8), (6, 8))]
Block = tuple[int, int]


def weight_and_gradients(shape: tuple[int, int], m: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = 3 * torch.rand(m, 1, 1, generator=generator)
    return torch.randn(shape, generator=generator), torch.randn(m, *shape, generator=generator) * sizes


def fisher_of(gradients: Tensor, damping: float) -> Tensor:
    """F [d, d] of rows [m, rows, in], d = rows * in."""
    g = gradients.double().flatten(1)
    return damping * torch.eye(g.shape[1], dtype=torch.float64) + g.T @ g / len(g)


def saliency_of(weight: Tensor, gradients: Tensor, block: Block, damping: float) -> Tensor:
    """1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q of every block, F of its block row inverted whole."""
    rows, cols = grid((weight.shape[0], weight.shape[1]), block)
    score = torch.zeros(rows, cols, dtype=torch.float64)
    for i, (w, g) in enumerate(zip(weight.double().split(block[0]), gradients.split(block[0], dim=1), strict=True)):
        inverse = torch.linalg.inv(fisher_of(g, damping))
        for j in range(cols):
            inside = torch.zeros_like(w)
            inside[:, j * block[1] : (j + 1) * block[1]] = 1
            q = inside.flatten().nonzero()[:, 0]
            score[i, j] = w.flatten()[q] @ torch.linalg.inv(inverse[q[:, None], q]) @ w.flatten()[q] / 2
    return score


def compensated_of(weight: Tensor, gradients: Tensor, mask: Tensor, block: Block, damping: float) -> Tensor:
    """The minimum of 1/2 x^T F x over moves x of each block row that make the removed weights zero."""
    kept, new = expand(mask, (weight.shape[0], weight.shape[1]), block), weight.double().clone()
    for w, k, g in zip(new.split(block[0]), kept.split(block[0]), gradients.split(block[0], dim=1), strict=True):
        f, flat = fisher_of(g, damping), w.flatten()
        on, off = k.flatten().nonzero()[:, 0], (~k).flatten().nonzero()[:, 0]
        if len(on):
            flat[on] = flat[on] + torch.linalg.solve(f[on[:, None], on], f[on[:, None], off] @ flat[off])
        flat[off] = 0
        w.copy_(flat.view_as(w))
    return new


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_block_fisher_is_half_the_mean_square_of_what_a_block_adds_to_the_loss(shape: tuple[int, int], block: Block) -> None:
    weight, gradients = weight_and_gradients(shape)
    rows, cols = grid(shape, block)
    expected = torch.zeros(rows, cols, dtype=torch.float64)
    for i in range(rows):
        for j in range(cols):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            w = weight[at].double().flatten()
            expected[i, j] = w @ fisher_of(gradients[(slice(None), *at)], 0.0) @ w / 2
    assert relative(block_fisher(weight, gradients, block), expected) < 1e-12


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_mfac_saliency_is_that_of_the_dense_inverse(shape: tuple[int, int], block: Block) -> None:
    weight, gradients = weight_and_gradients(shape)
    found = mfac_saliency(weight, gradients, block, DAMPING)
    assert relative(found, saliency_of(weight, gradients, block, DAMPING)) < 1e-10


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_mfac_weights_are_the_best_of_their_block_row(shape: tuple[int, int], block: Block, density: float) -> None:
    weight, gradients = weight_and_gradients(shape)
    mask = torch.rand(grid(shape, block), generator=torch.Generator().manual_seed(3)) < density
    before = weight.clone()
    found = mfac_compensated(weight, gradients, mask, block, DAMPING)
    assert torch.equal(weight, before)
    assert not found[~expand(mask, shape, block)].any()
    assert found.dtype == weight.dtype
    if mask.any():
        assert relative(found, compensated_of(weight, gradients, mask, block, DAMPING)) < 1e-6
    if mask.all():
        assert torch.equal(found, weight)


BLOCKS = ((8, 8), (12, 16))  # heights whose multiples meet every 24 rows, which divide no layer of 32


def plan_of(model: nn.Module, method: str, blocks: tuple[Block, ...] = BLOCKS, images: int = 6, asked: int = 4) -> Plan:
    model.pretrained_cfg["input_size"] = (3, 32, 32)
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(images, 3, 32, 32, generator=generator), torch.randint(5, (images,), generator=generator)
    settings = PruneSection(method=method, block=blocks, min_keep=0, beta=0, fisher_images=asked)
    layers = prunable_layers(model, Layers())
    statistics = collect(model, layers, [(x, labels)], calibration_loss("empirical", 0), CPU, lambda done: None)
    batches = [(x[:3], labels[:3]), (x[3:], labels[3:])]
    facts = {"task": Classification(), "gradient": "sampled", "seed": 3, "device": CPU, "progress": lambda *_: None}
    return build_plan(settings, model, layers, statistics, batches, example=x[:1], **facts)


def whole(gradients: ImageGradients) -> dict[str, Tensor]:
    """G [m, out, in] of every layer at once."""
    return {name: g.clone() for name, _, g in gradients.stream(dict.fromkeys(gradients.layers, 10**6))}


@pytest.mark.parametrize("method", ["mfac", "fisher"])
def test_the_curves_of_a_plan_are_made_of_the_scores_of_whole_layers(tiny_vit: nn.Module, method: str) -> None:
    plan = plan_of(tiny_vit, method)
    assert (len(plan.method.gradients.images), plan.gradient, plan.seed) == (4, "sampled", 3)
    gradients = whole(plan.method.gradients)
    damping = float(torch.cat([g.flatten() for g in gradients.values()]).double().square().mean())
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.proj"):
        for block, option in zip(BLOCKS, plan.groups[name].options, strict=True):
            weight = plan.layers[name].weight.detach()
            if method == "mfac":
                score = saliency_of(weight, gradients[name], block, damping)
            else:
                score = block_fisher(weight, gradients[name], block)
            assert option.removal.grid == tuple(score.shape)
            assert relative(option.removal.distortion[1:], score.flatten().sort().values.cumsum(0)) < 1e-5
            gone = option.removal.order[:3]
            assert relative(score.flatten()[gone], score.flatten().sort().values[:3]) < 1e-5


@pytest.mark.parametrize("method", ["mfac", "fisher"])
@pytest.mark.parametrize("blocks", [BLOCKS, BLOCKS[1:]])
def test_a_pruned_model_has_the_best_weights_for_its_masks(tiny_vit: nn.Module, method: str, blocks: tuple[Block, ...]) -> None:
    plan = plan_of(tiny_vit, method, blocks)
    model, pruned = prune_model(plan, Budget(sparsity=0.6), lambda *_: None)
    gradients = whole(plan.method.gradients)
    damping = float(torch.cat([g.flatten() for g in gradients.values()]).double().square().mean())
    compared = 0
    for name, layer in sparse_layers(model).items():
        block, mask, weight = pruned.option(name).block, pruned.masks[name], plan.layers[name].weight.detach()
        if mask.all() or weight.shape[1] > 64:  # F of fc2 takes long to invert
            continue
        if method == "mfac":
            expected = compensated_of(weight, gradients[name], mask, block, damping)
        else:
            expected = weight * expand(mask, (weight.shape[0], weight.shape[1]), block)
        assert relative(layer.weight.to_dense(), expected) < 1e-5
        compared += 1
    assert compared >= 4


def test_blocks_that_do_not_fit_are_refused_before_any_gradient_is_taken(tiny_vit: nn.Module) -> None:
    layers = prunable_layers(tiny_vit, Layers())
    image = (torch.full((1, 3, 32, 32), float("nan")), torch.zeros(1, dtype=torch.long))
    gradients = ImageGradients(tiny_vit, layers, single_images([image], 1), lambda: calibration_loss("empirical", 0), CPU)
    tiny_vit.register_forward_hook(lambda *_: pytest.fail("ran the model"))
    with pytest.raises(UsageError, match="prune.block: 64x32 is larger than layer blocks.0.attn.proj"):
        block_scores(block_fisher, gradients, ((64, 32),), lambda *_: None)


FEW = ("--set", "calibrate.images=24", "--set", "data.val_images=32", "--set", "prune.fisher_images=16")


@pytest.mark.parametrize("method", ["mfac", "fisher"])
def test_the_command_prunes_by_it(tmp_path: Path, method: str) -> None:
    same_places = ("--set", "prune.reorder=false")  # so that weights can be compared one by one
    options = ("digits_vit", "-o", tmp_path / "run", *FEW, *same_places, "--set", f"prune.method={method}", "--json")
    assert run_cli("calibrate", *options).code == 0
    result = run_cli("prune", *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["method"] == method
    assert 0 <= 0.5 - report["linear_kept_fraction"] < 0.011  # a block is 1 % of the weights
    assert not [note for note in report["notes"] if "fisher_images" in note]
    dense, moved = build_model(Recipe.load("digits_vit").model), 0.0
    for name, layer in sparse_layers(load_model(tmp_path / "run" / "pruned")).items():
        weight = dense.get_submodule(name).weight * (layer.weight.to_dense() != 0)
        if weight.any():  # a layer may lose all its blocks
            moved += relative(layer.weight.to_dense(), weight)
    assert (moved > 0) == (method == "mfac"), "M-FAC moves the weights that it keeps"
    fewer = json.loads(run_cli("prune", *options, "--set", "prune.fisher_images=40").out)
    told = "gradients of 24 images, fewer than the 40 of prune.fisher_images: raise calibrate.images"
    assert told in fewer["notes"]
