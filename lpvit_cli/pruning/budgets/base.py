"""What a kind of budget is: what it counts along the removals of a layer, and in the rest of the model.

Costs are in a unit of the kind's own; `kept` and `value` turn the user's number into a cost and back.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lpvit_cli.progress import Progress
    from lpvit_cli.pruning.groups import Option
    from lpvit_cli.pruning.plan import Plan


class BudgetKind:
    """One kind of budget. A subclass gives `along`, `rest` and `unit`; or, if `is_searched`, `settle` instead."""

    needs_profile = False  # counts what a device profile says
    is_searched = False  # an outcome: pruned models are made until one meets it
    larger_keeps_more = True
    above: float | None = None  # the value must be greater
    least: float | None = None
    below: float | None = None  # the value must be less
    most: float | None = None

    @classmethod
    def refusal(cls, value: float) -> str:
        """The rule that a value breaks; empty: it is fine."""
        if not math.isfinite(value):
            return "should be a finite number"
        if cls.above is not None and value <= cls.above:
            return f"should be greater than {cls.above:g}"
        if cls.least is not None and value < cls.least:
            return f"should be greater than or equal to {cls.least:g}"
        if cls.below is not None and value >= cls.below:
            return f"should be less than {cls.below:g}"
        if cls.most is not None and value > cls.most:
            return f"should be less than or equal to {cls.most:g}"
        return ""

    @classmethod
    def along(cls, plan: Plan, layer: str, option: Option) -> Tensor:
        """The cost of a layer after 0, 1 ... removals [steps + 1], float64."""
        raise NotImplementedError

    @classmethod
    def of_blocks(cls, option: Option) -> Tensor:
        """What each block adds [rows, cols], for when other blocks go than were planned; default: its weights."""
        return option.cost.weights

    @classmethod
    def rest(cls, plan: Plan) -> float:
        """The cost of the model outside the prunable layers."""
        raise NotImplementedError

    @classmethod
    def unit(cls, plan: Plan) -> float:
        """The cost that is 1 in the user's number."""
        raise NotImplementedError

    @classmethod
    def kept(cls, value: float) -> float:
        """What is kept, in units, where the user says `value`; `value` is its inverse."""
        return value

    @classmethod
    def value(cls, kept: float) -> float:
        return kept

    @classmethod
    def settle(cls, plan: Plan, value: float, judge: Judge, progress: Progress) -> Any:
        """Of a searched kind: the Budget, of a kind that counts costs, that meets it. Raises UsageError when none does."""
        raise NotImplementedError


if TYPE_CHECKING:
    Judge = Callable[[nn.Module, str], float]  # a model and what is being done -> its quality, in the task's points
