"""A model that merges tokens between its blocks: what that takes of a model, and how it is put in and taken out.

The container of the blocks is replaced by one that merges; blocks, and the names of all that has a state, stay as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.tokens.merge import TokenMerge, take

Model = TypeVar("Model", bound=nn.Module)
MASKS = ("attn_mask", "attention_mask")  # what blocks of timm and of transformers call what is added to attention's logits
WITHOUT = "leave merging out: --set tokens=null"


class Merging(BaseModel):
    """How a model merges: `fraction` of the tokens after each of the blocks `after`; the first `prefix` tokens are left alone.

    `restores`: after the last block every patch has its token again, a copy of what it was merged into. So heads and pooling
    that read more than the first tokens are given what they were made for: a mean is weighted by sizes, and so is attention.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: Annotated[float, Field(gt=0, le=0.5)]
    after: tuple[NonNegativeInt, ...]
    prefix: NonNegativeInt
    restores: bool

    @field_validator("after")
    @classmethod
    def _in_order(cls, after: tuple[int, ...]) -> tuple[int, ...]:
        if not after or list(after) != sorted(set(after)):
            raise ValueError("after: should be blocks in order, each once")
        return after


class MergingBlocks(nn.Sequential):
    """Blocks in a row, with merges in between as their children `merge`, which have no state."""

    def __init__(self, blocks: list[nn.Module], mask: str, merging: Merging):
        super().__init__(*blocks)
        self.mask, self.merging = mask, merging
        for number in merging.after:
            blocks[number].merge = TokenMerge(merging.prefix, merging.fraction)

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """x [batch, tokens, width] to the same, or without the tokens that were merged. Raises UsageError where the blocks are
        given more that is of all tokens, such as positions."""
        tracing = torch.compiler.is_compiling()  # transformers then makes a mask that hides nothing, and none otherwise
        if not tracing and (mask is not None or any(isinstance(value, Tensor | tuple) for value in kwargs.values())):
            raise UsageError(
                "tokens: the blocks of this model are given positions of all patches, merged ones have none", WITHOUT
            )
        size: Tensor | None = None
        places: Tensor | None = None
        if self.merging.restores:
            places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], x.shape[1])
        blocks: list[Any] = list(self._modules.values())
        for block in blocks:
            weights = None if size is None else size.log().transpose(1, 2).unsqueeze(1).to(x.dtype)  # [batch, 1, 1, tokens]
            x = block(x, **{self.mask: weights}, **kwargs)
            if hasattr(block, "merge"):
                if size is None:
                    size = torch.ones_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
                x, size, places = block.merge(x, size, places)
        return x if places is None else take(x, places)


class MergingLayers(MergingBlocks):
    """For models that call their blocks in a loop: the loop finds one, this."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self])


def container_of(model: nn.Module) -> tuple[str, str]:
    """The name of the module that holds the blocks, and what they call the mask of attention.

    Raises UsageError, with the reason, where tokens cannot be merged between them.
    """
    rows = [(name, rows) for name, module in model.named_modules() if (rows := _row(module))]
    if len(rows) > 1:
        raise UsageError(f"tokens: this model has {len(rows)} stages of blocks, not one row of them", WITHOUT)
    mask = next((mask for _, blocks in rows for mask in MASKS if mask in inspect.signature(blocks[0].forward).parameters), None)
    if mask is None:
        raise UsageError(
            "tokens: the attention of this model takes no mask, so it cannot weigh merged tokens by what they stand for",
            WITHOUT,
        )
    return rows[0][0], mask


def _row(module: nn.Module) -> list[nn.Module]:
    """The blocks in a container of them: modules of one class with attention inside."""
    blocks = list(module._modules.values()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
    alike = len({type(block) for block in blocks}) == 1 and any("att" in name for name, _ in blocks[0].named_children())
    return [block for block in blocks if block is not None] if alike else []


def install(model: nn.Module, merging: Merging) -> None:
    """Make `model`, in place, merge. Raises UsageError where it cannot."""
    name, mask = container_of(model)
    container = model.get_submodule(name)
    blocks = list(container._modules.values())
    if beyond := [number for number in merging.after if not 0 <= number < len(blocks)]:
        raise UsageError(
            f"tokens.after: there is no block {beyond[0]}: this model has {len(blocks)}", f"give 0 to {len(blocks) - 1}"
        )
    if len(blocks) - 1 in merging.after:
        raise UsageError(
            f"tokens.after: {len(blocks) - 1} is the last block, after which none is left to see fewer tokens", "leave it out"
        )
    for block in blocks:
        if block is not None:
            block._modules.pop("merge", None)
    kind = MergingBlocks if isinstance(container, nn.Sequential) else MergingLayers
    model.set_submodule(name, kind([block for block in blocks if block is not None], mask, merging))


def unmerged(model: Model) -> Model:
    """A copy that merges nothing."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, MergingBlocks):
            blocks: list[Any] = list(module._modules.values())
            for block in blocks:
                block._modules.pop("merge", None)
            plain = nn.ModuleList(blocks) if isinstance(module, MergingLayers) else nn.Sequential(*blocks)
            model.set_submodule(name, plain)
    return model


def merging_of(model: nn.Module) -> Merging | None:
    """How a model merges; None where it does not."""
    return next((module.merging for module in model.modules() if isinstance(module, MergingBlocks)), None)


def prefix_of(model: Any) -> int:
    """How many tokens before those of the patches a model has. Raises UsageError where nobody says."""
    inner = getattr(model, "model", model)
    if isinstance(found := getattr(inner, "num_prefix_tokens", None), int):
        return found
    patch = getattr(getattr(inner, "config", None), "patch_size", None)
    if isinstance(patch, int):
        _, height, width = model.pretrained_cfg["input_size"]
        return _tokens_before(model, container_of(model)[0]) - (height // patch) * (width // patch)
    raise UsageError(
        "tokens: it is not known which tokens of this model are class tokens, which must not be merged",
        "give the module an attribute num_prefix_tokens",
    )


def _tokens_before(model: Any, container: str) -> int:
    """The tokens that the first block is given for one image."""
    seen: list[int] = []
    first = next(iter(model.get_submodule(container)._modules.values()))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        with torch.no_grad():
            model(black_image(model))
    finally:
        handle.remove()
    return seen[0]


def black_image(model: Any) -> Tensor:
    """One image of the model's size, where and in what its parameters are."""
    return next(model.parameters()).new_zeros(1, *model.pretrained_cfg["input_size"])
