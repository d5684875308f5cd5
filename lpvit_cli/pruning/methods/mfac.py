"""mfac: blocks by the inverse Fisher of a block row's weights, the kept ones making up for the removed (arXiv 2107.03356)."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from lpvit_cli.curvature import ImageGradients
from lpvit_cli.curvature.mfac import FisherInverse
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.blocks import Block, expand
from lpvit_cli.pruning.methods.fisher import BlockFisher, Score, Tell
from lpvit_cli.pruning.plan import Allocation
from lpvit_cli.recipe.prune import Budget


class Mfac(BlockFisher):
    """Damped by the mean squared gradient: M-FAC itself leaves the constant to its user, GPTQ (arXiv 2210.17323) takes a
    share of the mean diagonal, which for a Fisher matrix is just that."""

    @property
    def score(self) -> Score:
        return partial(mfac_saliency, damping=self.gradients.mean_square)

    def prune(self, budget: Budget, progress: Progress) -> tuple[nn.Module, Allocation, dict[str, Tensor]]:
        allocation = self.plan.allocation(budget)
        model, masks = copy.deepcopy(self.plan.model), allocation.planned_masks()
        blocks = {name: allocation.option(name).block for name in masks}
        weights = compensated_by_mfac(self.gradients, masks, blocks, partial(progress, "compensating"))
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        return model, allocation, masks


def mfac_saliency(weight: Tensor, gradients: Tensor, block: Block, damping: float) -> Tensor:
    """1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, [rows, cols] float64: what a block costs if all other weights of its block row adapt.

    F = damping I + 1/m G^T G of the block row; `weight` [out, in], `gradients` [m, out, in].
    """
    scores = []
    for w, g in zip(weight.split(block[0]), gradients.split(block[0], dim=1), strict=True):
        fisher = FisherInverse(g.flatten(1), damping)
        index = torch.arange(w.numel(), device=w.device).view_as(w)
        blocks = zip(index.split(block[1], dim=1), w.split(block[1], dim=1), strict=True)
        scores.append([fisher.block_saliency(i.flatten(), w_q.flatten()) for i, w_q in blocks])
    return torch.tensor(scores, dtype=torch.float64)


def mfac_compensated(weight: Tensor, gradients: Tensor, mask: Tensor, block: Block, damping: float) -> Tensor:
    """The weight [out, in] after removing the blocks off the mask [rows, cols], all of a block row at once: its kept weights
    move by -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q, with F as in `mfac_saliency`."""
    kept = expand(mask.to(weight.device), (weight.shape[0], weight.shape[1]), block)
    new = weight * kept
    for first in range(0, len(weight), block[0]):
        row = slice(first, first + block[0])
        w, gone = weight[row].flatten(), (~kept[row]).flatten().nonzero()[:, 0]
        if 0 < len(gone) < len(w):
            move = FisherInverse(gradients[:, row].flatten(1), damping).block_update(gone, w[gone])
            new[row] += move.view_as(new[row]).to(new) * kept[row]
    return new


def compensated_by_mfac(
    gradients: ImageGradients, masks: dict[str, Tensor], blocks: dict[str, Block], tell: Tell
) -> dict[str, Tensor]:
    """The weight of each layer that loses blocks, by its mask and block shape: `mfac_compensated`, damped as the scores are."""
    pruned = [name for name, mask in masks.items() if not mask.all()]
    if not pruned:
        return {}
    damping = gradients.mean_square
    weights = {name: gradients.layers[name].weight.detach().clone() for name in pruned}
    total, done = sum(len(weight) for weight in weights.values()), 0
    for name, rows, g in gradients.stream({name: blocks[name][0] for name in pruned}):
        mask = masks[name][rows.start // blocks[name][0]][None]
        weights[name][rows] = mfac_compensated(weights[name][rows].to(g), g, mask, blocks[name], damping).cpu()
        done += rows.stop - rows.start
        tell(done, total, name)
    return weights
