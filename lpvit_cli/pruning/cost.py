"""What a layer costs to run, whole and with blocks removed: FLOPs and predicted energy.

FLOPs count every multiplication and addition of matrix products and convolutions, attention included; one multiply-add is
two FLOPs (papers that call a multiply-add one FLOP print half of it).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lpvit_cli.pruning.blocks import Block, block_elements
from lpvit_cli.recipe.prune import Power

BYTES_PER_VALUE = 4  # float32


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
