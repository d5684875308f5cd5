"""max_drop: the sparsest model that loses at most so many points before recovery, found by bisection."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lpvit_cli.errors import UsageError
from lpvit_cli.pruning.budgets.base import BudgetKind

if TYPE_CHECKING:
    from lpvit_cli.progress import Progress
    from lpvit_cli.pruning.budgets.base import Judge
    from lpvit_cli.pruning.plan import Plan
    from lpvit_cli.recipe.prune import Budget

SEARCH_STEP = 0.01  # of the FLOPs: how finely the search looks


class MaxDrop(BudgetKind):
    is_searched = True
    least, most = 0.0, 100.0

    @classmethod
    def settle(cls, plan: Plan, value: float, judge: Judge, progress: Progress) -> Budget:
        """The lowest FLOPs budget whose one-shot model is at most `value` points worse than the dense one, to a hundredth of
        the FLOPs. Raises UsageError when not even the largest budget below dense is."""
        least = judge(plan.model, "evaluating the dense model") - value
        return search(plan, least, judge, progress)


def search(plan: Plan, least: float, judge: Judge, progress: Progress) -> Budget:
    """The lowest FLOPs budget whose one-shot model still has a quality of `least`."""
    from lpvit_cli.pruning.engine import prune_model
    from lpvit_cli.recipe.prune import Budget

    def flops(steps: int) -> Budget:
        return Budget.model_validate({"flops": steps * SEARCH_STEP})

    lowest = plan.reachable(Budget.model_validate({"flops": 1}))
    low, high = math.ceil(lowest / SEARCH_STEP - 1e-9), round(1 / SEARCH_STEP)  # high holds: it is the dense model
    while high - low > 0:
        middle = (low + high) // 2
        model, _ = prune_model(plan, flops(middle), progress)
        quality = judge(model, f"evaluating at {middle * SEARCH_STEP:.0%} of the FLOPs")
        low, high = (low, middle) if quality >= least else (middle + 1, high)
    if high * SEARCH_STEP >= 1:
        raise UsageError(
            f"prune.budget: no pruned model keeps {least:.2f} points (of 100) without recovery",
            "allow a larger max_drop, or give a flops budget and let finetune-lora-ga recover",
        )
    return flops(high)
