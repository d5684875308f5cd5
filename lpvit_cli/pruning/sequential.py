"""Sequential calibration: layers are pruned in the order in which they run, each on what the already pruned ones give it.

With x the dense model's inputs of a layer and x' the pruned prefix's, the new weight minimises ||x W^T - x' W'^T||^2 over the
kept blocks, so that a layer also makes up for the errors before it (the order of SparseGPT, arXiv 2301.00774, with the dense
model's output as target).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.surgeon import compensated, merged, removal_order


def prune_sequentially(
    dense: nn.Module,
    model: nn.Module,
    removed: dict[str, int],
    row_weights: dict[str, Tensor],
    batches: list[Tensor],
    block: Block,
    on_layer: Callable[[str], None],
) -> dict[str, Tensor]:
    """Prune `model` (a copy of `dense`, changed in place) layer by layer; returns the block masks.

    `removed`: blocks each layer loses; `row_weights` [out] of each, as in `removal_order`; `batches`: images [n, 3, H, W].
    Runs both models up to each layer: two partial forward passes over all batches a layer.
    """
    masks = {}
    for name in removed:
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        hessian, cross = _moments(dense, model, name, batches)
        everything = torch.ones(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]), dtype=torch.bool)
        ideal = compensated(weight, hessian, everything, block, cross)
        order, errors = removal_order(ideal, (hessian / 2).to(weight.dtype), block, row_weights[name])
        mask = torch.ones(order.numel(), dtype=torch.bool)
        mask[merged(order, errors)[0][: removed[name]]] = False
        masks[name] = mask.reshape(order.shape)
        model.get_submodule(name).weight.data = compensated(weight, hessian, masks[name], block, cross)
        on_layer(name)
    return masks


def _moments(dense: nn.Module, model: nn.Module, name: str, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """2/N sum x'^T x' and 2/N sum x^T x' [in, in], float64, over the N tokens of all batches."""
    hessian = cross = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for images in batches:
        x, x_pruned = _input_of(dense, name, images), _input_of(model, name, images)
        hessian = hessian + (x_pruned.T @ x_pruned).double()
        cross = cross + (x.T @ x_pruned).double()
        tokens += len(x)
    return hessian * (2 / tokens), cross * (2 / tokens)


class _Reached(Exception):
    """Ends a forward pass at the layer of interest."""


@torch.inference_mode()
def _input_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What `model` feeds the named layer for these images: [tokens, in]."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        model(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
