"""sparsity: the removed fraction of the prunable weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpvit_cli.pruning.budgets.base import BudgetKind

if TYPE_CHECKING:
    from torch import Tensor

    from lpvit_cli.pruning.groups import Option
    from lpvit_cli.pruning.plan import Plan


class Sparsity(BudgetKind):
    larger_keeps_more = False
    least, below = 0.0, 1.0

    @classmethod
    def along(cls, plan: Plan, layer: str, option: Option) -> Tensor:
        return option.removal.along(option.cost.weights)

    @classmethod
    def rest(cls, plan: Plan) -> float:
        return 0.0

    @classmethod
    def unit(cls, plan: Plan) -> float:
        return plan.total("weights")

    @classmethod
    def kept(cls, value: float) -> float:
        return 1 - value

    @classmethod
    def value(cls, kept: float) -> float:
        return 1 - kept
