"""latency_ms: milliseconds of a call of the whole model, as the device profile predicts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpvit_cli.pruning.budgets.base import BudgetKind

if TYPE_CHECKING:
    from torch import Tensor

    from lpvit_cli.pruning.groups import Option
    from lpvit_cli.pruning.plan import Plan


class Latency(BudgetKind):
    needs_profile = True
    above = 0.0

    @classmethod
    def along(cls, plan: Plan, layer: str, option: Option) -> Tensor:
        profile = plan.profiled()
        rows = plan.flops.tokens[layer] * profile.batch_size
        return profile.linear_ms(option.cost.shape, rows, option.block, option.removal.kept_fractions)

    @classmethod
    def of_blocks(cls, option: Option) -> Tensor:
        return option.cost.weights.new_ones(option.cost.weights.shape)  # a profile counts blocks

    @classmethod
    def rest(cls, plan: Plan) -> float:
        return plan.profiled().rest_ms

    @classmethod
    def unit(cls, plan: Plan) -> float:
        return 1.0
