"""Sequential pruning: layers are pruned in the order in which they run, each on what the already pruned ones give it.

With x the dense model's inputs of a layer and x' the pruned prefix's, the new weight minimises ||x W^T - x' W'^T||^2 over the
kept blocks, so that a layer also makes up for the errors before it (the order of SparseGPT, arXiv 2301.00774, with the dense
model's output as target).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
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


@dataclass(frozen=True)
class Pruning:
    """What one model is to lose: `model`, a copy of the dense one, is changed in place.

    Layers without a target, None, lose nothing, but make up for the errors before them. `output_weights` [out, out] of each
    layer, as in `removal_order`; `token_weights`: what the error of each token weighs, by layer and batch; None: all the same.
    `rows`: where the model has fewer neurons or heads, the rows of the dense layers that its own have.
    """

    model: nn.Module
    targets: Mapping[str, Target | None]
    output_weights: Mapping[str, Tensor]
    token_weights: TokenWeights | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)


def prune_sequentially(
    dense: nn.Module,
    prunings: Sequence[Pruning],
    batches: list[Tensor],
    on_layer: Callable[[str], None],
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """Prune each of several models layer by layer; returns the block masks of each, in the order of running.

    The passes of the dense model are made once for all of them, and no model depends on the others. All have targets for the
    same layers. `batches`: images [n, C, H, W]; `dtype`: in which models compute. With several processes, each with images of
    its own, the layers are pruned on those of all together, by the main one.
    """
    device = next(dense.parameters()).device
    example = distributed.broadcast(batches[0][:1] if distributed.is_main() else None)
    assert example is not None
    blocks = blocks_of(dense, prunings[0].targets, example.to(device, torch.float32))
    ahead, walks = Replay(dense, batches, device, dtype), list[_Walk]()
    for block in blocks:
        ahead.enter(block.name)
        for walk in walks:
            walk.behind.enter(block.name)
            walk.behind.follow(ahead)
        walks = walks or [_Walk(one, ahead.taken_on(one.model), len(batches)) for one in prunings]
        for name in block.layers:
            whole = cast(nn.Linear, dense.get_submodule(name)).weight.detach()
            for walk, moments in zip(walks, _moments(ahead, walks, whole, name), strict=True):
                walk.prune(name, *moments)
            on_layer(name)
            release_memory()
    return [walk.masks for walk in walks]


class _Walk:
    """One model on its way through the layers."""

    def __init__(self, pruning: Pruning, behind: Replay, batches: int):
        self.pruning, self.behind, self.batches = pruning, behind, batches
        self.masks: dict[str, Tensor] = {}
        self.spare = 0.0  # what earlier layers, in whole blocks, could not keep of their share

    def token_weights(self, layer: str) -> Iterable[Tensor | None]:
        return _token_weights(self.pruning.token_weights, layer, self.batches) or repeat(None, self.batches)

    def prune(self, name: str, hessian: Tensor, wanted: Tensor) -> None:
        """The moments are those of `_moments`."""
        layer, rows = self.pruning.model.get_submodule(name), self.pruning.rows.get(name)
        assert isinstance(layer, nn.Linear)
        wanted = wanted if rows is None else wanted[rows.to(wanted.device)]
        made, mask = distributed.on_main(lambda: self._pruned(name, layer.weight.detach(), hessian, wanted))
        layer.weight.data = made.to(layer.weight)
        if mask is not None:
            self.masks[name] = mask

    def _pruned(self, name: str, weight: Tensor, hessian: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """The new weight, and the block mask of a layer that loses some; on the CPU."""
        target = self.pruning.targets[name]
        if target is None:
            return refitted(weight, hessian, wanted).cpu(), None
        present = block_sums(weight.abs(), target.block) > 0  # what an earlier pruning has removed stays removed
        best = compensated(weight, hessian, present.cpu(), target.block, wanted)
        found = removal_order(best, (hessian / 2).to(weight.dtype), target.block, self.pruning.output_weights[name])
        removal = Removal.greedy(*found, target.balanced)
        count, self.spare = target.removals(removal, self.spare)
        mask = removal.mask(count)
        return compensated(weight, hessian, mask, target.block, wanted).cpu(), mask


def _token_weights(of_layers: TokenWeights | None, layer: str, batches: int) -> list[Tensor] | None:
    """By batch, in a mean of one, equal weights mixed in; None where they are not known call by call."""
    found = (of_layers or {}).get(layer, [])
    sums = sum(float(w.double().sum()) for w in found), sum(len(w) for w in found), float(len(found) != batches)
    total = torch.tensor(sums, dtype=torch.float64)
    distributed.all_reduce(total)
    weight, tokens, unknown = total.tolist()
    if unknown or not weight > 0:
        return None
    return [(w * (tokens / weight) + PLAIN) / (1 + PLAIN) for w in found]


def _moments(ahead: Replay, walks: Sequence[_Walk], whole: Tensor, layer: str) -> list[tuple[Tensor, Tensor]]:
    """Of each model 2/N sum w x'^T x' [in', in'] and 2/N sum w y^T x' [out, in'], float64, over the N tokens of all batches; x'
    its own inputs, y = x W^T the outputs [tokens, out] of the dense model, W = `whole` [out, in]."""
    narrow = len(whole) < whole.shape[1]  # then products with y cost less than with x
    sums = []
    for walk in walks:
        size = cast(nn.Linear, walk.pruning.model.get_submodule(layer)).in_features
        sums.append([torch.zeros(n, size, dtype=torch.float64, device=whole.device) for n in (size, min(whole.shape))])
    tokens = torch.zeros((), dtype=torch.int64)
    inputs = zip(*(zip(walk.behind.inputs(layer), walk.token_weights(layer), strict=True) for walk in walks), strict=True)
    for x, of_models in zip(ahead.inputs(layer), inputs, strict=True):
        reference = x.float() @ whole.float().T if narrow else x.float()
        for (hessian, cross), (x_pruned, w) in zip(sums, of_models, strict=True):
            x_pruned = x_pruned.float()
            weighted = x_pruned if w is None else x_pruned * w[:, None]
            hessian += x_pruned.T @ weighted
            cross += reference.T @ weighted
        tokens += len(x)
    distributed.all_reduce(*chain(*sums), tokens)
    scale = 2 / tokens
    return [
        (hessian.mul_(scale), cross.mul_(scale) if narrow else whole.double() @ cross.mul_(scale)) for hessian, cross in sums
    ]
