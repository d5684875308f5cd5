"""Which modules can lose hidden neurons or attention heads as a whole: the only place that knows how they are built.

In such a module only the `consumer` reads what the `producers` make. What nothing reads can go without a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.sparse.layers import BlockSparseLinear

COUNTS = ("num_heads", "num_attention_heads")  # where modules say how many heads they have
TABLES = ("relative_position_bias_table", "relative_position_bias.relative_position_bias_table")  # [positions, heads]
Names = tuple[str, ...]
MLPS: tuple[tuple[Names, str], ...] = (
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
)  # of transformers
ATTENTIONS: tuple[tuple[Names, str], ...] = tuple(
    (("q_proj", "k_proj", "v_proj"), consumer) for consumer in ("o_proj", "out_proj")
)


@dataclass(frozen=True)
class Coupled:
    """Layers, by their names in a module, that hold `units` hidden neurons or heads together."""

    producers: tuple[str, ...]
    consumer: str
    units: int
    width: int = 1  # features of a unit: of a head
    repeats: int = 1  # places of a unit in the rows of each producer: 3 of qkv
    heads: bool = False
    activation: Callable[[Tensor], Tensor] | None = None  # between the producer and the consumer, where it is all there is
    plain: bool = True  # False: something else takes part between the layers, so that none can go

    @property
    def features(self) -> int:
        """What the consumer reads."""
        return self.units * self.width

    def rows(self, keep: Tensor) -> Tensor:
        """The rows of each producer that the units at `keep` take."""
        places = self.features * torch.arange(self.repeats, device=keep.device)
        return (self.columns(keep) + places[:, None]).flatten()

    def columns(self, keep: Tensor) -> Tensor:
        """The columns of the consumer that the units at `keep` take."""
        return (keep[:, None] * self.width + torch.arange(self.width, device=keep.device)).flatten()


def coupled(module: nn.Module) -> Coupled | None:
    """What `module` holds together: timm's Mlp, Attention and WindowAttention, the MLPs and attentions of transformers."""
    if isinstance(module, Mlp):
        return _mlp(module, ("fc1",), "fc2", module.act)
    if isinstance(module, Attention | WindowAttention):
        return _timm_attention(module)
    if type(module).__module__.startswith("transformers.models."):
        return _of_transformers(module)
    return None


def set_heads(module: Any, keep: Tensor) -> None:
    """Tell an attention, in place, that it has the heads at `keep` only."""
    for name in COUNTS:
        if hasattr(module, name):
            setattr(module, name, len(keep))
    if isinstance(module, Attention):
        module.attn_dim = module.proj.in_features
    for name in TABLES:
        *path, last = name.split(".")
        holder = module.get_submodule(path[0]) if path and hasattr(module, path[0]) else None if path else module
        table = getattr(holder, last, None)
        if isinstance(table, nn.Parameter):
            setattr(holder, last, nn.Parameter(table.detach()[:, keep].clone(), table.requires_grad))


def _timm_attention(module: Any) -> Coupled:
    features, heads = module.proj.in_features, module.num_heads
    whole = module.qkv.out_features == 3 * features and (isinstance(module, WindowAttention) or hasattr(module, "attn_dim"))
    return Coupled(("qkv",), "proj", heads, features // heads, repeats=3, heads=True, plain=whole and _is_plain(module))


def _mlp(module: nn.Module, producers: tuple[str, ...], consumer: str, activation: Any) -> Coupled | None:
    if not all(_is_linear(getattr(module, name)) for name in (*producers, consumer)):  # convolutions of 1 x 1
        return None
    neurons = module.get_submodule(producers[0]).out_features
    assert isinstance(neurons, int)
    return Coupled(producers, consumer, neurons, activation=activation, plain=_is_plain(module))


def _is_plain(module: nn.Module) -> bool:
    """Whether no norm and no gate takes part between the layers, whose result or size other features would change."""
    extras = (getattr(module, "norm", None), getattr(module, "gate", None))
    return all(extra is None or isinstance(extra, nn.Identity) for extra in extras)


def _of_transformers(module: Any) -> Coupled | None:
    """By the names of its linear layers, all of which must be known."""
    linears = {name for name, child in module.named_children() if _is_linear(child)}
    others = {name for name, _ in module.named_children()} - linears
    if type(module).__name__.endswith(("MLP", "FFN")) and others <= {"activation_fn", "act_fn", "dropout"}:
        for producers, consumer in MLPS:
            if linears == {*producers, consumer}:
                activation = getattr(module, "activation_fn", None) or getattr(module, "act_fn", None)
                return _mlp(module, producers, consumer, activation if len(producers) == 1 else None)
    if type(module).__name__.endswith("Attention") and others <= {"relative_position_bias"}:
        for producers, consumer in ATTENTIONS:
            if linears == {*producers, consumer}:
                return _separate_attention(module, producers, consumer)
    return None


def _separate_attention(module: Any, producers: tuple[str, ...], consumer: str) -> Coupled | None:
    heads = next((getattr(module, name) for name in COUNTS if hasattr(module, name)), None)
    features = {getattr(module, consumer).in_features, *(getattr(module, name).out_features for name in producers)}
    width = getattr(module, "head_dim", None)
    if heads is None or width is None or features != {heads * width}:
        return None
    # BEiT's biases of positions come from without, one for each head that there was
    biased = any(getattr(module.config, f"use_{which}relative_position_bias", False) for which in ("", "shared_"))
    return Coupled(producers, consumer, heads, width, heads=True, plain=not biased)


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | BlockSparseLinear)
