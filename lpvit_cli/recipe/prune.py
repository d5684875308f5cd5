"""What pruning removes, under which budget."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lpvit_cli.recipe.data import Fraction
from lpvit_cli.recipe.errors import UNKNOWN_KEY, WRONG_VALUE
from lpvit_cli.recipe.section import Section, beside_the_recipe
from lpvit_cli.recipe.source import is_profile_name
from lpvit_cli.registry import BUDGETS, METHODS

Block = tuple[PositiveInt, PositiveInt]
BLOCKS = ("blocks.*", "*.blocks.*", "model.layers.*", "model.*.layers.*", "model.*.layer.*")  # of timm, and of transformers
TINY = ("*.cpb_mlp.*", "*.meta_mlp.*", "*.rel_pos.*", "*.pos_proj", "*.proj_l", "*.proj_w")  # of blocks: biases of positions,
# which see no image, and mixtures of heads


class Budget(BaseModel):
    """How much to keep, written as `{kind: value}`. Kinds: `flops` = kept fraction of the whole model's FLOPs, `sparsity` =
    removed fraction of the prunable weights, `latency_ms` of a batch and `energy_mj` of an image as the device profile
    predicts them (`lpvit profile`), `max_drop` = points of the task's metric (top-1; of features, hundredths of the cosine)
    that may be lost before recovery (the sparsest such model is searched)."""

    model_config = ConfigDict(frozen=True)

    kind: str
    value: float

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, given: Any) -> Any:
        if isinstance(given, Budget):
            return given
        if not isinstance(given, dict):
            raise ValueError(f"should be one of {', '.join(BUDGETS.names())} with its value")
        named = {key: value for key, value in given.items() if value is not None}
        for key in named:
            if key not in BUDGETS.names():
                raise PydanticCustomError(UNKNOWN_KEY, "unknown key", {"key": key})
        if len(named) != 1:
            raise ValueError(f"give exactly one of {', '.join(BUDGETS.names())} (lpvit recipes show digits_vit)")
        ((kind, value),) = named.items()
        return {"kind": kind, "value": _checked(kind, value)}

    @model_serializer
    def _as_written(self) -> dict[str, float]:
        return {self.kind: self.value}

    def __getattr__(self, name: str) -> Any:
        """The value under the name of its kind; None under those of other kinds."""
        if not name.startswith("_") and name in BUDGETS.names():
            return self.value if name == self.kind else None
        return super().__getattr__(name)  # type: ignore[misc]

    @classmethod
    def keys(cls) -> list[str]:
        return BUDGETS.names()

    @property
    def needs_profile(self) -> bool:
        """Whether it counts what a device profile says."""
        return bool(BUDGETS.get(self.kind).needs_profile)

    @property
    def is_searched(self) -> bool:
        """Whether it is an outcome that takes pruned models to find, not a cost."""
        return bool(BUDGETS.get(self.kind).is_searched)


def _checked(kind: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise PydanticCustomError(WRONG_VALUE, "should be a valid number", {"key": kind, "given": value}) from None
    if rule := BUDGETS.get(kind).refusal(number):
        raise PydanticCustomError(WRONG_VALUE, "{rule}", {"key": kind, "given": value, "rule": rule})
    return number


class Power(Section):
    """The power model E = e_mac * MACs + e_byte * bytes, per image. Defaults: fp32 multiply-add 4.6 pJ, DRAM 160 pJ/byte
    (Horowitz, ISSCC 2014, 45 nm). They weigh layers against each other; they are no measurement of your device."""

    e_mac_pj: float = Field(default=4.6, ge=0)  # picojoules of a multiply-add
    e_byte_pj: float = Field(default=160.0, ge=0)  # picojoules of a byte from memory
    batch_size: PositiveInt = 1  # images that share one read of the weights


def is_tiny(name: str) -> bool:
    """Whether a layer is of a kind that has a handful of inputs in every model: no block fits into it."""
    return any(fnmatch(name, glob) for glob in TINY)


class Layers(Section):
    """Which nn.Linear modules may be pruned, by glob over their names in the model."""

    include: tuple[str, ...] | None = None  # a layer needs one of these; None: the layers of the model's blocks
    exclude: tuple[str, ...] = ()  # and none of these

    @property
    def included_globs(self) -> tuple[str, ...]:
        return BLOCKS if self.include is None else self.include

    def included(self, name: str) -> bool:
        return any(fnmatch(name, glob) for glob in self.included_globs) and (self.include is not None or not is_tiny(name))

    def match(self, name: str) -> bool:
        return self.included(name) and not any(fnmatch(name, glob) for glob in self.exclude)


class PruneSection(Section):
    """Which blocks go, under which budget. `beta` weighs predicted power against distortion beside it; where every layer sees
    the same number of tokens (a plain ViT) a block costs the same power in every layer, and it changes nothing."""

    method: Annotated[str, AfterValidator(METHODS.require)] = "obs"  # which blocks go first
    reorder: bool = True  # before anything goes: neurons, dimensions of heads and residual channels sorted by saliency, so that
    # whole blocks become unimportant; the function stays the same, and it is proven on images
    reweigh: int = Field(default=1, ge=0)  # with obs: how often layers are weighed anew by gradients of the pruned model
    sequential: bool = True  # with obs: each layer on the inputs of the already pruned ones
    fisher_images: PositiveInt = 128  # with mfac and fisher: calibration images, each with a gradient of its own
    block: Block | Annotated[tuple[Block, ...], Field(min_length=1)] = (64, 32)  # output x input features; of several, a layer
    # takes the one that suits it
    patterns: tuple[Literal["blocks", "balanced", "neurons", "heads"], ...] = ()  # none: blocks; balanced: as many of them in
    # every block row; neurons, heads: whole hidden neurons and attention heads, cut out of both layers; with blocks beside
    # them: as much of each as is nearest to the dense model
    neuron_group: PositiveInt | None = None  # hidden neurons go in groups of so many; None: of the block's width
    budget: Budget = Budget.model_validate({"flops": 0.5})  # how much stays
    profile: Path | None = None  # the name of a saved device profile (lpvit profile --name), or a profile.json, for budgets in
    # ms and mJ and for predictions; None: that of this run
    beta: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0.0  # 0: accuracy alone decides under the budget;
    )
    # auto: the scale of the LPViT paper, by which power outweighs accuracy where layers see different numbers of tokens
    min_keep: Fraction = 0.0  # of each layer's blocks, rounded down
    layers: Layers = Layers()  # which layers may be pruned
    power: Power = Power()  # where no device profile knows energies

    @field_validator("profile")
    @classmethod
    def _named_or_beside_the_recipe(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        return path if path and is_profile_name(str(path)) else beside_the_recipe(path, info)

    @field_validator("block", mode="before")
    @classmethod
    def _is_block_or_blocks(cls, block: Any) -> Any:
        """Both forms at once: an error of each would leave the reader to guess which one was meant."""
        shapes = block if isinstance(block, list | tuple) and block and isinstance(block[0], list | tuple) else [block]
        for shape in shapes:
            fits = isinstance(shape, list | tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
            if not fits:
                raise ValueError(
                    "a block is two whole numbers above 0, [output, input] features; several blocks are a list of them"
                )
        return block

    @model_validator(mode="after")
    def _patterns_fit(self) -> Self:
        if {*self.patterns} - {"blocks"} and not METHODS.get(self.method).takes_patterns:
            raise ValueError("patterns need method: obs")
        if set(self.patterns) & {"neurons", "heads"} and self.budget.needs_profile:
            raise ValueError("neurons and heads need a budget of flops, sparsity or max_drop: a profile has no smaller layers")
        return self

    @property
    def units(self) -> tuple[str, ...]:
        """What goes as a whole: neurons, heads."""
        return tuple(pattern for pattern in self.patterns if pattern in ("neurons", "heads"))

    @property
    def is_mixed(self) -> bool:
        return bool(self.units) and "blocks" in self.patterns

    @property
    def unit_width(self) -> int:
        """Hidden neurons of a group."""
        return self.neuron_group or self.blocks[0][1]

    @property
    def height(self) -> int | None:
        """So many outputs share a mask, whatever the shape of their blocks: only errors of these are weighed together. None: of
        all outputs, since whole units go, or outputs are sorted first."""
        return None if self.reorder or self.units else math.lcm(*(block[0] for block in self.blocks))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The shapes of `block`, each once."""
        return tuple(dict.fromkeys((self.block,) if isinstance(self.block[0], int) else self.block))
