"""Physically smaller modules: an MLP with fewer hidden neurons, an attention with fewer heads. Exact: what goes was unused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.models.coupled import coupled, set_heads
from lpvit_cli.sparse.layers import BlockSparseLinear


def width(module: nn.Module) -> int | None:
    """Hidden neurons of an MLP or heads of an attention: what `narrow` makes fewer; None for other modules."""
    found = coupled(module)
    return found.units if found else None


def narrow(module: nn.Module, keep: Tensor) -> None:
    """Keep, in place, the hidden neurons of an MLP or the heads of an attention at `keep` (indices) only.

    Inputs and outputs keep their sizes. Exact where the layer that reads the others has zeros for them. Of block-sparse
    layers whole blocks should go: the others stay what they are. Raises ValueError where something else, a norm or a gate,
    stands between the layers.
    """
    found = coupled(module)
    if found is None or not found.plain:
        raise ValueError(f"{type(module).__name__}: a norm or a gate stands between its layers: it cannot be made narrower")
    for name in found.producers:
        setattr(module, name, _rows(getattr(module, name), found.rows(keep)))
    setattr(module, found.consumer, _columns(getattr(module, found.consumer), found.columns(keep)))
    if found.heads:
        set_heads(module, keep)


def narrow_to(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Keep, in place, the first hidden neurons or heads of modules, as many as `widths` says by name. Raises ValueError or
    AttributeError where the model has no such module or not so many."""
    for name, kept in widths.items():
        module = model.get_submodule(name)
        units = width(module)
        if units is None or not 0 < kept <= units:
            raise ValueError(f"{name}: config.json says {kept} neurons or heads, the architecture has {units}")
        if kept < units:
            narrow(module, torch.arange(kept))


def dense_weight(layer: nn.Module) -> Tensor:
    """[out, in] of a linear layer, block-sparse or not; detached."""
    weight: Any = layer.weight
    dense: Tensor = weight.to_dense() if isinstance(weight, BlockSparseMatrix) else weight
    return dense.detach()


def _rows(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[keep], None if layer.bias is None else layer.bias.detach()[keep])


def _columns(layer: Any, keep: Tensor) -> Any:
    return _like(layer, dense_weight(layer)[:, keep], None if layer.bias is None else layer.bias.detach().clone())


def _like(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A layer of the same kind, whose parameters are trained if those of `layer` are."""
    made: Any
    if isinstance(layer, BlockSparseLinear):
        made = BlockSparseLinear(BlockSparseMatrix.from_dense(weight, layer.weight.block), bias)
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = nn.Parameter(weight.clone())
        made.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(getattr(layer, name).requires_grad)
    return made
