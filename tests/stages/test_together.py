"""Several budgets at once: each model is what its budget alone makes, and what they share is made once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from plans import plan_of, quiet
from torch import nn

from lpvit_cli.pruning.engine import prune_model, prune_models
from lpvit_cli.recipe.prune import Budget

BUDGETS = [Budget(sparsity=0.7), Budget(sparsity=0.3)]
MIXED = ("prune.patterns=[blocks,neurons,heads]", "prune.neuron_group=4", "prune.block=[8,8]", "prune.reweigh=1")


@pytest.mark.parametrize(
    "overrides", [("prune.reweigh=1",), MIXED, ("prune.sequential=false",), ("prune.method=taylor",)], ids=str
)
def test_a_budget_among_others_makes_the_model_that_it_makes_alone(overrides: tuple[str, ...]) -> None:
    """To the last bit, with the same notes."""
    together = prune_models(plan_of("vit", *overrides), BUDGETS, quiet)
    for budget, (model, allocation) in zip(BUDGETS, together, strict=True):
        alone, expected = prune_model(plan_of("vit", *overrides), budget, quiet)
        state = alone.state_dict()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert allocation.notes() == expected.notes()


def calls_of_the_dense_model(budgets: list[Budget]) -> int:
    """Of its last block, while models are pruned to these budgets."""
    plan, calls = plan_of("vit", "prune.reweigh=1"), Counter[int]()
    last = plan.model.get_submodule("blocks.1")
    of_dense = id(last)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.update([id(module)]))
    try:
        prune_models(plan, budgets, quiet)
    finally:
        handle.remove()
    return calls[of_dense]


def test_the_dense_model_runs_as_often_for_many_budgets_as_for_one() -> None:
    assert calls_of_the_dense_model(BUDGETS[:1]) == calls_of_the_dense_model(BUDGETS) > 0
