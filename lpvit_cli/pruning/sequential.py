"""Sequential pruning: layers are pruned in the order in which they run, each on what the already pruned ones give it.

With x the dense model's inputs of a layer and x' the pruned prefix's, the new weight minimises ||x W^T - x' W'^T||^2 over the
kept blocks, so that a layer also makes up for the errors before it (the order of SparseGPT, arXiv 2301.00774, with the dense
model's output as target).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import cast

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.curvature import TokenWeights
from lpvit_cli.curvature.statistics import PLAIN
from lpvit_cli.measure.memory import release_memory
from lpvit_cli.pruning.block_obs import compensated, refitted, removal_order
from lpvit_cli.pruning.blocks import Block, block_sums
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
    token_weights: TokenWeights | None = None,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Prune `model` (a copy of `dense`, changed in place) layer by layer; returns the block masks, in the order of running.

    Layers without a target, None, lose nothing, but make up for the errors before them. `output_weights` [out, out] of each
    layer, as in `removal_order`; `batches`: images [n, C, H, W]; `dtype`: in which models compute; `token_weights`: what the
    error of each token weighs, by layer and batch; None: all the same. `rows`: where `model` has fewer neurons or heads, the
    rows of the dense layers that its own have. With several processes, each with images of its own, the layers are pruned on
    those of all together.
    """
    device = next(model.parameters()).device
    masks: dict[str, Tensor] = {}
    spare = 0.0  # what earlier layers, in whole blocks, could not keep of their share
    blocks = blocks_of(dense, targets, batches[0][:1].to(device, torch.float32))
    ahead, behind = (Replay(one, batches, device, dtype) for one in (dense, model))
    for block in blocks:
        ahead.enter(block.name)
        behind.enter(block.name)
        behind.follow(ahead)
        for name in block.layers:
            hessian, cross = _moments(ahead, behind, name, _token_weights(token_weights, name, len(batches)))
            layer, target = model.get_submodule(name), targets[name]
            assert isinstance(layer, nn.Linear)
            weight, whole = layer.weight.detach(), cast(nn.Linear, dense.get_submodule(name)).weight.detach()
            wanted = (whole[rows[name]] if rows and name in rows else whole).double() @ cross
            if target is None:
                layer.weight.data = refitted(weight, hessian, wanted)
            else:
                present = block_sums(weight.abs(), target.block) > 0  # what an earlier pruning has removed stays removed
                layer.weight.data = compensated(weight, hessian, present.cpu(), target.block, wanted)
                found = removal_order(layer.weight.data, (hessian / 2).to(weight.dtype), target.block, output_weights[name])
                removal = Removal.greedy(*found, target.balanced)
                count, spare = target.removals(removal, spare)
                masks[name] = removal.mask(count)
                layer.weight.data = compensated(weight, hessian, masks[name], target.block, wanted)
            on_layer(name)
            release_memory()
    return masks


def _token_weights(of_layers: TokenWeights | None, layer: str, batches: int) -> list[Tensor] | None:
    """By batch, in a mean of one, equal weights mixed in; None where they are not known call by call."""
    found = (of_layers or {}).get(layer, [])
    if len(found) != batches:
        return None
    total = torch.tensor([sum(float(w.double().sum()) for w in found), sum(len(w) for w in found)], dtype=torch.float64)
    distributed.all_reduce(total)
    mean = float(total[0] / total[1])
    return [(w / mean + PLAIN) / (1 + PLAIN) for w in found] if mean > 0 else None


def _moments(ahead: Replay, behind: Replay, layer: str, weights: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """2/N sum w x'^T x' [in', in'] and 2/N sum w x^T x' [in, in'], float64, over the N tokens of all batches; x of the dense
    model, x' of the other."""
    before, size = (cast(nn.Linear, one.model.get_submodule(layer)).in_features for one in (ahead, behind))
    hessian, cross = (torch.zeros(n, size, dtype=torch.float64, device=behind.device) for n in (size, before))
    tokens = torch.zeros((), dtype=torch.int64)
    of_batches = weights or repeat(None, len(ahead.batches))
    for x, x_pruned, w in zip(ahead.inputs(layer), behind.inputs(layer), of_batches, strict=True):
        x, x_pruned = x.float(), x_pruned.float()
        weighted = x_pruned if w is None else x_pruned * w[:, None]
        hessian += x_pruned.T @ weighted
        cross += x.T @ weighted
        tokens += len(x)
    distributed.all_reduce(hessian, cross, tokens)
    return hessian.mul_(2 / tokens), cross.mul_(2 / tokens)
