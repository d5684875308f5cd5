"""How a model is to merge tokens: a recipe's `tokens`, made definite for that model, and proven to merge."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.tokens.blocks import WITHOUT, Merging, MergingBlocks, black_image, container_of, install, prefix_of

MOST = 0.5  # of the tokens, that one merge can take away
STEP = 1e-3  # how finely a fraction is searched


def merge_tokens(model: VisionModel, merging: Merging | None) -> VisionModel:
    """A copy of `model` that merges; without merging the model itself. Raises UsageError where its blocks do not see fewer
    tokens then."""
    if merging is None:
        return model
    merged = copy.deepcopy(model)
    install(merged, merging)
    try:
        seen = tokens_of_blocks(merged)
    except UsageError:
        raise
    except Exception as error:  # code of any library may run into fewer tokens than it has positions for
        kind = type(error).__name__
        raise UsageError(f"tokens: this model does not run with fewer tokens than patches ({kind})", WITHOUT) from error
    if not seen or min(seen) >= max(seen):
        raise UsageError(
            "tokens: the blocks still see all tokens: this model calls them past their container, or too few tokens would go",
            f"raise tokens.fraction, or {WITHOUT}",
        )
    return merged


def merging_for(model: VisionModel, wanted: TokensSection) -> Merging:
    """How `model` must merge for a recipe's `tokens`. Raises UsageError where it cannot, or not so much."""
    container, _ = container_of(model)
    depth = len(model.get_submodule(container)._modules)
    after = tuple(range(0, depth - 1, 2)) if wanted.after is None else wanted.after
    if not after:
        raise UsageError("tokens: this model has one block, after which none is left to see fewer tokens", WITHOUT)
    prefix = prefix_of(model)
    merging = Merging(fraction=wanted.fraction or MOST, after=after, prefix=prefix, restores=reads_all_tokens(model, prefix))
    merge_tokens(model, merging)  # what is wrong is told before anything is counted
    return merging if wanted.flops is None else with_fraction(merging, fraction_for(model, merging, wanted.flops))


def fraction_for(model: VisionModel, merging: Merging, share: float) -> float:
    """The least fraction with which `model` needs at most `share` of its FLOPs. Raises UsageError where none does."""

    dense = count_flops(model, ()).total

    def flops(steps: int) -> float:
        return merged_flops(model, with_fraction(merging, steps * STEP)) / dense

    low, high = 1, round(MOST / STEP)
    if (least := flops(high)) > share:
        raise UsageError(
            f"tokens.flops: {share:g} cannot be reached by merging: with these blocks it can be from {least:.3f} to 1",
            "give more blocks to merge after (tokens.after), or let prune.budget do the rest",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if flops(middle) <= share else (middle + 1, high)
    return low * STEP


def merged_flops(model: VisionModel, merging: Merging) -> int:
    """Of one image, by a copy that merges and shares the tensors of `model`."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    merged = copy.deepcopy(model, memo)
    install(merged, merging)
    return count_flops(merged, ()).total


def with_fraction(merging: Merging, fraction: float) -> Merging:
    return merging.model_copy(update={"fraction": fraction})


def reads_all_tokens(model: VisionModel, prefix: int) -> bool:
    """Whether what comes after the last block reads more than the first tokens, by changing the others there."""
    probe = copy.deepcopy(model)
    for module in probe.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # a new head, through which nothing would be seen
            nn.init.ones_(module.weight)
    name, _ = container_of(probe)
    blocks: list[Any] = list(probe.get_submodule(name)._modules.values())
    noise = 0.0

    def disturb(_: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        changed = tokens.clone()
        random = torch.randn(changed[:, prefix:].shape, generator=torch.Generator().manual_seed(0))
        changed[:, prefix:] += noise * random.to(changed)
        return changed

    blocks[-1].register_forward_hook(disturb)
    with torch.no_grad():
        calm = probe(black_image(probe))
        noise = 1.0
        return not torch.equal(calm, probe(black_image(probe)))


def tokens_of_blocks(model: nn.Module) -> list[int]:
    """How many tokens each block of a model that merges is given for one image; none where it goes past them."""
    seen: list[int] = []
    blocks = next(module for module in model.modules() if isinstance(module, MergingBlocks))
    handles = [
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in blocks._modules.values()
        if block is not None
    ]
    try:
        with torch.no_grad():
            model(black_image(model))
    finally:
        for handle in handles:
            handle.remove()
    return seen
