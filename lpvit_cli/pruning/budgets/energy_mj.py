"""energy_mj: millijoules of an image, as the device profile predicts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lpvit_cli.pruning.budgets.latency_ms import Latency

if TYPE_CHECKING:
    from torch import Tensor

    from lpvit_cli.pruning.groups import Option
    from lpvit_cli.pruning.plan import Plan


class Energy(Latency):
    @classmethod
    def along(cls, plan: Plan, layer: str, option: Option) -> Tensor:
        profile = plan.profiled()
        rows = plan.flops.tokens[layer] * profile.batch_size
        return profile.linear_mj(option.cost.shape, rows, option.block, option.removal.kept_fractions)

    @classmethod
    def rest(cls, plan: Plan) -> float:
        return plan.profiled().rest_mj or 0.0

    @classmethod
    def unit(cls, plan: Plan) -> float:
        return plan.profiled().batch_size
