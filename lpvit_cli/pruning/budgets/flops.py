"""flops: the kept fraction of the whole model's FLOPs, attention included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpvit_cli.pruning.budgets.base import BudgetKind

if TYPE_CHECKING:
    from torch import Tensor

    from lpvit_cli.pruning.groups import Option
    from lpvit_cli.pruning.plan import Plan


class Flops(BudgetKind):
    above, most = 0.0, 1.0

    @classmethod
    def along(cls, plan: Plan, layer: str, option: Option) -> Tensor:
        return option.removal.along(option.cost.flops)

    @classmethod
    def of_blocks(cls, option: Option) -> Tensor:
        return option.cost.flops

    @classmethod
    def rest(cls, plan: Plan) -> float:
        return plan.flops.total - plan.total("flops")

    @classmethod
    def unit(cls, plan: Plan) -> float:
        return plan.flops_dense
