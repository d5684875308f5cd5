"""tokens: auto. How much of a budget merging tokens takes, and how much the weights.

Merging costs little to try: the statistics of the model without it do for the choice. Of five splits, nothing by tokens to all
of it, that one is taken whose model, each layer pruned for itself, is nearest to the dense one on held-back images.
"""

from __future__ import annotations

from collections.abc import Callable

from lpvit_cli.errors import UsageError
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.merging import MOST, merge_tokens, merged_flops, merging_for
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.plan import Plan
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.tokens.blocks import Merging

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the FLOPs, or of the time, that go, by merging


def split(
    model: VisionModel, budget: Budget, plan_of: Callable[[VisionModel], Plan], progress: Progress
) -> tuple[Merging | None, str]:
    """How `model` should merge so that it can be pruned to a `budget` of FLOPs or milliseconds best, and a note that says so;
    None: not at all.

    `plan_of`: the plan of the model, or of a copy of it that merges. Raises UsageError where no split meets the budget.
    """
    most = merging_for(model, TokensSection(fraction=MOST))  # a model that cannot merge is refused before any work
    plan, found = plan_of(model), dict[float, tuple[float, Merging | None]]()
    whole = (plan.latency_ms_dense or 0.0) if budget.kind == "latency_ms" else 1.0
    if budget.value >= whole:
        return None, "tokens: auto: no tokens are merged: the budget takes nothing away"
    least = whole
    for done, share in enumerate(SHARES):
        flops = 1 - share * (1 - budget.value / whole)
        progress("splitting the budget", done, len(SHARES), f"tokens to {flops:.0%} of the FLOPs")
        try:
            merging = merging_for(model, TokensSection(flops=flops)) if share else None
        except UsageError:  # it cannot do so much
            merging, flops = most, merged_flops(model, most) / count_flops(model, ()).total
        tried = plan_of(merge_tokens(model, merging)) if merging else plan
        least = min(least, tried.reachable(budget))
        if tried.reachable(budget) <= budget.value:
            found[flops] = tried.method.distance(budget, progress), merging
        if merging is most:
            break
    if not found:
        raise UsageError(
            f"prune.budget: {budget.kind} {budget.value:g} cannot be reached: merging and weights can make it from "
            f"{least:.4g} to {whole:.4g}",
            "choose a value in between, or lower prune.min_keep",
        )
    chosen = min(found, key=lambda flops: found[flops][0])
    distances = ", ".join(f"{flops:.0%}: {distance:.3g}" for flops, (distance, _) in found.items())
    what = f"tokens are merged to {chosen:.0%} of the FLOPs, weights give the rest" if chosen < 1 else "no tokens are merged"
    return found[chosen][1], f"tokens: auto: {what}: nearest to the dense model on held-back images (distances {distances})"
