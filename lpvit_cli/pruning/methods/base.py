"""What a pruning method is: in which order the blocks of a layer go, and what becomes of the weights that stay."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lpvit_cli.progress import Progress
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.recipe.prune import Budget

if TYPE_CHECKING:
    from lpvit_cli.pruning.plan import Allocation, Plan

    Pruned = tuple[nn.Module, Allocation, dict[str, Tensor]]


class Method(ABC):
    """A method at work on one plan. The order a curve was made of is the order the mask is made of.

    A method that only ranks blocks gives `removal`; one whose kept weights make up for the others overrides `prune`.
    """

    takes_patterns = False  # whether neurons, heads and balanced rows can be asked for

    def __init__(self, plan: Plan):
        self.plan = plan

    def prepare(self, progress: Progress) -> None:
        """What is needed before the first `removal`."""
        return

    @abstractmethod
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        """The removal order of a layer in blocks of this shape, and the distortion along it."""

    def prune(self, budget: Budget, progress: Progress) -> Pruned:
        """A copy of the model with the kept weights as this method leaves them, what each group loses, and the block masks of
        the layers that decide. Removed weights may have any value."""
        allocation = self.plan.allocation(budget)
        return copy.deepcopy(self.plan.model), allocation, allocation.planned_masks()

    @classmethod
    def prune_all(cls, wanted: Sequence[tuple[Plan, Budget]], progress: Progress) -> list[Pruned]:
        """`prune` for several plans of one dense model, each with its budget; a method may make once what they share."""
        return [plan.method.prune(budget, progress) for plan, budget in wanted]

    def notes(self) -> list[str]:
        """What a user should know about every pruning of the plan."""
        return []
