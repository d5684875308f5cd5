"""Plans of small models: what they promise against what the pruned model is, counted and computed anew."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from stages.plans import BLOCK, batches, plan_of, quiet
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.flops import count_flops
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.plan import Plan
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.report.layers import layer_reports
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The dense weights of all layers that were pruned."""
    dense = densify(model)
    return {name: dense.get_submodule(name).weight.detach() for name in sparse_layers(model)}


def tokens(which: str, layer: str) -> int:
    """17 of a ViT; 8 x 8 in the first stage of a Swin, 4 x 4 in the second."""
    return 17 if "vit" in which else 64 if layer.startswith("layers.0.") else 16


def largest_unit(plan: Plan) -> float:
    """The most FLOPs that one removal saves."""
    return max(
        float(-option.removal.along(option.cost.flops).diff().min()) for part in plan.groups.values() for option in part.options
    )


# FLOPs and weights


@pytest.mark.parametrize("in_sequence", [True, False], ids=["sequential", "each layer alone"])
@pytest.mark.parametrize("patterns", ["", "neurons", "heads", "neurons,heads", "balanced", "heads,balanced"])
@pytest.mark.parametrize("which", ["vit", "swin"])
def test_what_is_promised_is_what_the_pruned_model_has(which: str, patterns: str, in_sequence: bool) -> None:
    """FLOPs of the narrower model counted anew, less twice the zeros that each token meets in its layers."""
    plan = plan_of(which, f"prune.patterns=[{patterns}]", f"prune.sequential={in_sequence}")
    dense = count_flops(plan.model, {}).total
    model, pruned = prune_model(plan, Budget(flops=0.6), quiet)
    predicted, made = plan.predict(pruned), weights(model)
    assert list(made) == list(plan.layers), "every layer is stored in blocks, whole ones as one"
    zeros = {name: int((weight == 0).sum()) for name, weight in made.items()}
    counted = count_flops(densify(model), {}).total - sum(2 * tokens(which, name) * n for name, n in zeros.items())
    assert predicted.flops == counted
    assert 0.6 * dense - largest_unit(plan) < counted <= 0.6 * dense

    kept = {name: weight.numel() - zeros[name] for name, weight in made.items()}
    assert predicted.kept_fraction == pytest.approx(
        sum(kept.values()) / sum(layer.weight.numel() for layer in plan.layers.values())
    )
    reports = {report.name: report for report in layer_reports(pruned)}
    assert list(reports) == list(plan.layers)
    for name, report in reports.items():
        assert report.shape == tuple(plan.layers[name].weight.shape)
        assert report.flops == 2 * tokens(which, name) * kept[name]
        assert report.flops_dense == 2 * tokens(which, name) * plan.layers[name].weight.numel()
        assert report.kept_blocks == "".join(report.kept_map).count("#")
        assert report.blocks == len("".join(report.kept_map))
    if "balanced" in patterns:
        for layer in sparse_layers(model).values():
            assert len(set(layer.row_ptr.diff().tolist())) == 1, "as many blocks in every block row"


@pytest.mark.parametrize("which", ["vit", "swin"])
def test_a_narrow_model_computes_what_the_masked_one_does(which: str) -> None:
    """The kept weights of one that is cut and of one that is masked are the same, the outputs too."""
    plan = plan_of(which, "prune.patterns=[neurons,heads]", "prune.sequential=false")
    model, pruned = prune_model(plan, Budget(flops=0.6), quiet)
    masked = copy.deepcopy(plan.model)
    for name, part in plan.groups.items():
        columns = pruned.masks[name][0].repeat_interleave(pruned.option(name).block[1])
        weight, hessian = plan.layers[name].weight.detach().double(), plan.statistics[name].token_hessian.double()
        damped = hessian + 1e-2 * hessian.diagonal().mean() * torch.eye(len(hessian))
        new = torch.zeros_like(weight)
        new[:, columns] = torch.linalg.solve(damped[columns][:, columns], damped[columns] @ weight.T).T
        masked.get_submodule(name).weight.data = new.float()
        assert part.coupling is not None
    x = batches(6)[0][0]
    assert relative(model(x), masked(x)) < 1e-4
    assert relative(plan.model(x), masked(x)) > 2e-3


def test_a_layer_that_is_kept_whole_is_one_block() -> None:
    plan = plan_of("vit", "prune.layers.include=['*.fc2', blocks.0.attn.qkv]", "prune.sequential=false")
    plan.groups["blocks.0.attn.qkv"].options[0].removal.distortion[1:] = 1e9  # nobody would touch it
    model, pruned = prune_model(plan, Budget(sparsity=0.3), quiet)
    whole = model.get_submodule("blocks.0.attn.qkv")
    assert isinstance(whole, BlockSparseLinear)
    assert whole.values.shape == (1, 96, 32)
    assert relative(whole.values[0], plan.layers["blocks.0.attn.qkv"].weight) < 1e-5
    (report,) = [r for r in layer_reports(pruned) if r.name == "blocks.0.attn.qkv"]
    assert (report.block, report.kept_blocks, report.blocks) == (BLOCK, 24, 24)
    assert model.get_submodule("blocks.0.mlp.fc2").values.shape[1:] == BLOCK


# several block shapes


SHAPES = [(16, 8), (8, 16), (20, 12)]  # the last divides no layer


@pytest.mark.parametrize("in_sequence", [True, False])
def test_every_layer_takes_one_of_several_shapes_and_says_which(in_sequence: bool) -> None:
    plan = plan_of("vit", "prune.block=[[16,8],[8,16],[20,12]]", f"prune.sequential={in_sequence}")
    total = count_flops(plan.model, {}).total
    model, pruned = prune_model(plan, Budget(flops=0.6), quiet)
    assert [option.block for option in plan.groups["blocks.0.mlp.fc1"].options] == SHAPES
    taken = {report.name: report.block for report in layer_reports(pruned)}
    assert set(taken.values()) <= set(SHAPES)
    assert len(set(taken.values())) > 1, "different layers are suited by different shapes"
    slack, zeros = 0, 0
    for name, layer in sparse_layers(model).items():
        assert tuple(layer.values.shape[1:]) == (taken[name] if not pruned.masks[name].all() else tuple(layer.weight.shape))
        zeros += int((layer.weight.to_dense() == 0).sum())
        slack += taken[name][0] * taken[name][1]
    left = total - 2 * 17 * zeros
    assert plan.predict(pruned).flops == left <= 0.6 * total
    one_block = 2 * 17 * (20 * 12 if not in_sequence else slack)  # in sequence, each layer may end a part of a block below
    assert left > 0.6 * total - one_block


@pytest.mark.parametrize("budget", [0.45, 0.5, 0.55, 0.6, 0.65, 0.7])
def test_blocks_that_divide_no_layer_stay_within_the_budget_in_sequence(budget: float) -> None:
    plan = plan_of("vit", "prune.block=[20,12]", "prune.min_keep=0.2")
    model, _ = prune_model(plan, Budget(flops=budget), quiet)
    left = plan.flops.total - sum(2 * 17 * int((weight == 0).sum()) for weight in weights(model).values())
    assert 0.97 * budget < left / plan.flops.total <= budget


def test_a_choice_of_shapes_distorts_no_more_than_the_best_of_them() -> None:
    def distortion(blocks: str) -> float:
        plan = plan_of("vit", f"prune.block={blocks}", "prune.beta=0")
        pruned = plan.allocation(Budget(sparsity=0.5))
        return sum(pruned.distortion(name) for name in plan.groups)

    single = [distortion(str(list(shape))) for shape in SHAPES[:2]]
    assert distortion("[[16,8],[8,16]]") < min(single)


@pytest.mark.parametrize("block", ["[[16,8],[97,8]]", "[[200,8]]"])
def test_a_shape_that_is_larger_than_a_layer_is_named(block: str) -> None:
    with pytest.raises(UsageError, match=r"prune.block: (97|200)x8 is larger than layer blocks.0.attn.(qkv|proj) \("):
        plan_of("vit", f"prune.block={block}")


# budgets


@pytest.mark.parametrize("which", ["vit", "swin"])
@pytest.mark.parametrize("patterns", ["", "neurons,heads"])
def test_what_cannot_be_reached_is_told_with_what_can(which: str, patterns: str) -> None:
    plan = plan_of(which, "prune.min_keep=0.25", f"prune.patterns=[{patterns}]")
    with pytest.raises(UsageError, match=r"sparsity 0.8 cannot be reached: with min_keep 0.25 it can be from 0 to 0.75$"):
        plan.allocation(Budget(sparsity=0.8))
    assert plan.predict(plan.allocation(Budget(sparsity=0.75))).kept_fraction == pytest.approx(0.25)
    assert plan.predict(plan.allocation(Budget(sparsity=0))).kept_fraction == 1
    lowest = plan.reachable(Budget(flops=1))
    with pytest.raises(UsageError, match=r"flops 0.1 cannot be reached: .* it can be from [0-9.]+ to 1$") as caught:
        plan.allocation(Budget(flops=0.1))
    told = float(caught.value.message.split(" from ")[1].split()[0])
    assert lowest <= told < 1.001 * lowest
    assert plan.predict(plan.allocation(Budget(flops=told))).flops <= told * plan.flops.total
    pruned = plan.allocation(Budget(flops=lowest))
    assert plan.predict(pruned).flops == pytest.approx(lowest * plan.flops.total)
    with pytest.raises(UsageError, match="cannot be reached"):
        plan.allocation(Budget(flops=lowest * 0.999))


@pytest.mark.parametrize("min_keep", [0.05, 0.1, 1 / 3, 0.34, 0.7])
@pytest.mark.parametrize("kind", ["flops", "sparsity"])
def test_the_furthest_value_that_is_told_can_be_asked_for(kind: str, min_keep: float) -> None:
    plan = plan_of("vit", f"prune.min_keep={min_keep}", "prune.method=magnitude")
    too_far = {"flops": 1e-3, "sparsity": 0.999}[kind]
    with pytest.raises(UsageError, match="cannot be reached") as caught:
        plan.allocation(Budget.model_validate({kind: too_far}))
    low, high = (float(n) for n in caught.value.message.split(" from ")[1].split(" to "))
    furthest = low if kind == "flops" else high
    assert furthest == pytest.approx(plan.reachable(Budget.model_validate({kind: 0.5})), rel=1e-3)
    plan.allocation(Budget.model_validate({kind: furthest}))


def test_a_pair_never_loses_all() -> None:
    """A block with no head or no neuron is none of timm's."""
    plan = plan_of("vit", "prune.min_keep=0", "prune.patterns=[neurons,heads]")
    model, _ = prune_model(plan, Budget(flops=plan.reachable(Budget(flops=1))), quiet)
    assert [module.num_heads for name, module in model.named_modules() if name.endswith(".attn")] == [1, 1]
    assert [module.fc1.out_features for name, module in model.named_modules() if name.endswith(".mlp")] == [8, 8]
    assert model(batches(2)[0][0]).isfinite().all()


# pruning in sequence


def test_passes_in_bfloat16_prune_much_as_those_in_float32_do() -> None:
    """The outputs are as near to the dense ones, and to each other much nearer; most blocks are the same."""
    made, plans = [], []
    for dtype in (torch.float32, torch.bfloat16):
        plan = plan_of("vit", "prune.reweigh=1")
        plan.dtype = dtype
        made.append(prune_model(plan, Budget(sparsity=0.4), quiet))
        plans.append(plan)
    (exact, in_float), (rough, in_bfloat) = made
    x = batches(20)[0][0]
    with torch.no_grad():
        dense, (a, b) = plans[0].model(x), (model(x) for model in (exact, rough))
    assert not torch.equal(a, b), "bfloat16 was not used"
    assert all(tensor.dtype == torch.float32 for tensor in rough.parameters())
    assert relative(b, dense) < 1.2 * relative(a, dense)
    same = [(in_float.masks[name] == mask).double().mean() for name, mask in in_bfloat.masks.items()]
    assert float(torch.stack(same).mean()) > 0.9


@pytest.mark.parametrize("method", ["lpvit", "taylor", "magnitude"])
def test_methods_without_compensation_know_no_sequence(method: str) -> None:
    """The default, sequential: true, is theirs to ignore: kept weights stay what they were."""
    made = [
        prune_model(
            plan_of("vit", f"prune.method={method}", f"prune.sequential={s}", "prune.reweigh=2"), Budget(sparsity=0.5), quiet
        )[0]
        for s in ("true", "false")
    ]
    states = [model.state_dict() for model in made]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    dense = plan_of("vit").layers
    for name, weight in weights(made[0]).items():
        assert torch.equal(weight, torch.where(weight != 0, dense[name].weight, 0.0))


# the same again


@pytest.mark.parametrize(
    "overrides", [["prune.reweigh=1"], ["prune.patterns=[heads]"], ["calibrate.gradient=sampled", "prune.reweigh=1"]]
)
def test_a_seed_makes_the_same_model_to_the_last_bit(overrides: list[str]) -> None:
    first, second = (prune_model(plan_of("vit", *overrides), Budget(flops=0.5), quiet)[0].state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_budget_that_removing_blocks_does_not_change_says_so() -> None:
    with pytest.raises(UsageError, match=r"sparsity 0.5 cannot be reached: with min_keep 1 removing blocks leaves it at 0"):
        plan_of("vit", "prune.min_keep=1").allocation(Budget(sparsity=0.5))
