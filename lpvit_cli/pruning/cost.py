"""What a layer costs to run, whole and with blocks removed: FLOPs and predicted energy.

FLOPs count every multiplication and addition of matrix products and convolutions, attention included; one multiply-add is
two FLOPs (papers that call a multiply-add one FLOP print half of it).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lpvit_cli.models import VisionModel
from lpvit_cli.pruning.blocks import Block, block_elements
from lpvit_cli.recipe import Power

BYTES_PER_VALUE = 4  # float32


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one image, of the model and of the products within each attention module; tokens each linear layer sees."""

    total: int
    tokens: dict[str, int]
    attention: dict[str, int]


def count_flops(model: VisionModel, layers: Iterable[str]) -> ModelFlops:
    """Count on the meta device, where attention is plain matrix products (the CPU's fused attention escapes the counter).

    `layers`: names of linear layers, block-sparse ones too, whose tokens are told.
    """
    tokens: dict[str, int] = {}
    meta = _meta_copy(model).float()
    for name in layers:
        meta.get_submodule(name).register_forward_hook(
            lambda _, x, y, name=name: tokens.__setitem__(name, tokens.get(name, 0) + x[0].numel() // x[0].shape[-1])
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counter = FlopCounterMode(display=False)
        with counter:
            meta(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    products = {
        name.partition(".")[2]: sum(flops for operation, flops in counts.items() if operation is torch.ops.aten.bmm)
        for name, counts in counter.get_flop_counts().items()
    }
    return ModelFlops(counter.get_total_flops(), tokens, {name: flops for name, flops in products.items() if flops})


def _meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with tensors that hold no data."""
    import copy

    memo = {id(t): torch.empty_like(t, device="meta") for t in [*model.parameters(), *model.buffers()]}
    memo |= {id(p): nn.Parameter(memo[id(p)], requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class LayerCost:
    """Per block [rows, cols] (float64): weights, FLOPs of one image, and energy of one image in picojoules."""

    shape: tuple[int, int]  # of the layer's weight: out, in
    weights: Tensor
    flops: Tensor
    energy_pj: Tensor
    fixed_energy_pj: float  # reading and writing the activations, whatever is pruned

    def predicted_energy_uj(self, mask: Tensor) -> float:
        """Predicted energy of the layer for one image with the masked blocks kept, in microjoules."""
        return (self.fixed_energy_pj + float(self.energy_pj[mask].sum())) * 1e-6


def layer_cost(layer: nn.Linear, tokens: int, block: Block, power: Power) -> LayerCost:
    """`tokens`: rows of x for one image. Energy: e_mac * MACs + e_byte * bytes of kept weights (shared by the images of a
    batch) and of activations."""
    shape = (layer.out_features, layer.in_features)
    weights = block_elements(shape, block)
    macs = weights * tokens
    weight_bytes = weights * BYTES_PER_VALUE / power.batch_size
    activations = tokens * (layer.in_features + layer.out_features) * BYTES_PER_VALUE
    energy = power.e_mac_pj * macs + power.e_byte_pj * weight_bytes
    return LayerCost(shape, weights, 2 * macs, energy, power.e_byte_pj * activations)
