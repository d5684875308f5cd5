"""Whole units and blocks under one budget."""

from __future__ import annotations

import pytest
import torch
from plans import batches, plan_of, quiet
from torch import nn

from lpvit_cli.errors import UsageError
from lpvit_cli.pruning import mixing
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.mixing import mixed, narrowed
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.sparse import BlockSparseLinear, densify

MIXED = ("prune.patterns=[blocks,neurons,heads]", "prune.neuron_group=4", "prune.block=[8,8]")
HALF = Budget(flops=0.6)


def widths(model: nn.Module) -> list[int]:
    return [module.fc1.out_features for name, module in model.named_modules() if name.endswith(".mlp")]


@pytest.mark.parametrize("share", [0.0, 1 / 3, 2 / 3])
def test_budgets_count_what_units_and_blocks_cost_together(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    plan = plan_of("vit", *MIXED)
    monkeypatch.setattr(mixing, "SHARES", (share,))
    model, allocation = prune_model(plan, HALF, quiet)
    flops = allocation.plan.predict(allocation).flops
    assert 0.5 * plan.flops.total < flops <= HALF.value * plan.flops.total
    assert (min(widths(model)) < min(widths(plan.model))) == (share > 0)
    assert any(isinstance(module, BlockSparseLinear) and module.row_ptr[-1] > 1 for module in model.modules())
    assert model(batches(2)[0][0]).isfinite().all()


def test_statistics_of_a_narrower_model_are_those_of_its_own_weights() -> None:
    """Rows and columns of what was cut are gone, in every statistic of the layers that held them."""
    plan = plan_of("vit", *MIXED)
    inner = narrowed(plan, HALF, 0.5, quiet)
    assert widths(inner.model) != widths(plan.model)
    for name, layer in inner.layers.items():
        out, columns = layer.weight.shape
        found = inner.statistics[name]
        assert found.A.shape == found.weighted.shape == (columns, columns)
        assert found.G.shape == (out, out)
        assert found.gradient.shape == (out, columns)
        rows = inner.rows.get(name)
        if rows is not None:
            assert torch.equal(layer.weight, plan.layers[name].weight[rows])
            assert torch.equal(found.G, plan.statistics[name].G[rows[:, None], rows])
    assert inner.dense is plan
    assert inner.rows, "some units are gone"


def test_the_nearest_share_is_taken_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("vit", *MIXED)
    distances = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(type(plan.method), "distance", lambda self, budget, progress: next(distances))
    chosen, note = mixed(plan, HALF, quiet)
    assert note == "67% of what goes are whole neurons and heads, the rest blocks"
    assert chosen.dense is plan
    assert not plan.told


def test_a_budget_that_no_share_meets_is_refused() -> None:
    plan = plan_of("vit", *MIXED)
    with pytest.raises(UsageError, match="cannot be reached"):
        mixed(plan, Budget(flops=0.001), quiet)


def test_the_model_is_the_same_with_zeros_for_what_is_gone() -> None:
    model, _ = prune_model(plan_of("vit", *MIXED), HALF, quiet)
    images = batches(2)[0][0]
    torch.testing.assert_close(densify(model)(images), model(images), atol=1e-5, rtol=1e-4)


def test_what_reads_units_makes_up_for_those_that_are_gone() -> None:
    """Its statistics are those of the neurons that fc1 keeps, and its error for the dense inputs is less than without them."""
    plan = plan_of("vit", *MIXED)
    inner = narrowed(plan, HALF, 0.5, quiet)
    narrower = [name for name in inner.rows if name.endswith(".mlp.fc1")]
    assert narrower
    for producer in narrower:
        consumer, kept = producer.replace("fc1", "fc2"), inner.rows[producer]
        whole = plan.statistics[consumer]
        assert torch.equal(inner.statistics[consumer].A, whole.A[kept[:, None], kept])
        errors = []
        for weight in (inner.layers[consumer].weight.detach(), plan.layers[consumer].weight.detach()[:, kept]):
            change = -plan.layers[consumer].weight.detach().double()
            change[:, kept] += weight
            errors.append(float(((change @ whole.token_hessian.double()) * change).sum()))
        assert errors[0] < 0.95 * errors[1]
