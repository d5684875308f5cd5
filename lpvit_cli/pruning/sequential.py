"""Sequential pruning: layers are pruned in the order in which they run, each on what the already pruned ones give it.

With x the dense model's inputs of a layer and x' the pruned prefix's, the new weight minimises ||x W^T - x' W'^T||^2 over the
kept blocks, so that a layer also makes up for the errors before it (the order of SparseGPT, arXiv 2301.00774, with the dense
model's output as target).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.measure.memory import release_memory
from lpvit_cli.pruning.block_obs import compensated, refitted, removal_order
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.removal import Removal
from lpvit_cli.pruning.replay import Replay, blocks_of


@dataclass(frozen=True)
class Target:
    """What a layer is to lose: blocks of this shape, until what is left costs no more than `kept`."""

    block: Block
    costs: Tensor  # of each block [rows, cols], in a unit that all layers share
    kept: float
    balanced: bool = False

    def removals(self, removal: Removal, spare: float) -> tuple[int, float]:
        """How many, with `spare` more to keep, and what then is spare. Other blocks may go than were planned, and at ragged
        edges they are smaller: their cost counts, not their number."""
        kept, allowed = removal.along(self.costs), self.kept + spare
        count = int((kept > allowed).sum())
        return count, allowed - float(kept[count])


def prune_sequentially(
    dense: nn.Module,
    model: nn.Module,
    targets: Mapping[str, Target | None],
    output_weights: dict[str, Tensor],
    batches: list[Tensor],
    on_layer: Callable[[str], None],
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Prune `model` (a copy of `dense`, changed in place) layer by layer; returns the block masks, in the order of running.

    Layers without a target, None, lose nothing, but make up for the errors before them. `output_weights` [out, out] of each layer, as in `removal_order`; `batches`: images [n, C, H, W]; `dtype`: in which the models
    compute. With several processes, each with images of its own, the layers are pruned on those of all together.
    """
    device = next(model.parameters()).device
    masks: dict[str, Tensor] = {}
    spare = 0.0  # what earlier layers, in whole blocks, could not keep of their share
    blocks = blocks_of(dense, targets, batches[0][:1].to(device, torch.float32))
    ahead, behind = (Replay(one, batches, device, dtype) for one in (dense, model))
    for block in blocks:
        ahead.enter(block.name)
        behind.enter(block.name)
        for name in block.layers:
            hessian, cross = _moments(ahead, behind, name)
            layer, target = model.get_submodule(name), targets[name]
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.detach()
            layer.weight.data = refitted(weight, hessian, cross)
            if target is not None:
                found = removal_order(layer.weight.data, (hessian / 2).to(weight.dtype), target.block, output_weights[name])
                removal = Removal.greedy(*found, target.balanced)
                count, spare = target.removals(removal, spare)
                masks[name] = removal.mask(count)
                layer.weight.data = compensated(weight, hessian, masks[name], target.block, cross)
            on_layer(name)
            release_memory()
    return masks


def _moments(ahead: Replay, behind: Replay, layer: str) -> tuple[Tensor, Tensor]:
    """2/N sum x'^T x' and 2/N sum x^T x' [in, in], float64, over the N tokens of all batches; x of the dense model, x' of the other."""
    size = behind.model.get_submodule(layer).in_features
    hessian, cross = (torch.zeros(size, size, dtype=torch.float64, device=behind.device) for _ in range(2))
    tokens = torch.zeros((), dtype=torch.int64)
    for x, x_pruned in zip(ahead.inputs(layer), behind.inputs(layer), strict=True):
        x, x_pruned = x.float(), x_pruned.float()
        hessian += x_pruned.T @ x_pruned
        cross += x.T @ x_pruned
        tokens += len(x)
    distributed.all_reduce(hessian, cross, tokens)
    return hessian.mul_(2 / tokens), cross.mul_(2 / tokens)
