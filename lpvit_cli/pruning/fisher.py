"""Blocks scored by the gradients of single images, G [m, out, in]: by the Fisher matrix of each block (`fisher`), or by the
inverse of that of a block row's weights, the kept ones making up for the removed (`mfac`). Both in units of the per-image loss.

Unlike the functions of saliency.py these take gradients that exist a few rows at a time (curvature/gradients.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lpvit_cli.curvature import ImageGradients
from lpvit_cli.curvature.mfac import FisherInverse
from lpvit_cli.pruning.blocks import Block, block_sums, expand, require_fit

GRADIENT_METHODS = ("mfac", "fisher")
Tell = Callable[[int, int, str], None]  # rows done, rows in all, layer


def block_fisher(weight: Tensor, gradients: Tensor, block: Block) -> Tensor:
    """1/2 w_Q^T F_QQ w_Q = mean over images of (sum over the block of g w)^2 / 2, [rows, cols] float64; `weight` [out, in],
    `gradients` [m, out, in] (Fisher pruning, Theis et al., arXiv 1801.05787). What is kept does not move."""
    return torch.stack([block_sums(g.double() * weight.double(), block).square() for g in gradients]).mean(dim=0) / 2


def mfac_saliency(weight: Tensor, gradients: Tensor, block: Block, damping: float) -> Tensor:
    """1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q, [rows, cols] float64: what a block costs if all other weights of its block row adapt.

    F = damping I + 1/m G^T G of the block row (M-FAC, arXiv 2107.03356); `weight` [out, in], `gradients` [m, out, in].
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


def block_scores(
    method: str, gradients: ImageGradients, blocks: tuple[Block, ...], tell: Tell
) -> dict[tuple[str, Block], Tensor]:
    """Scores [rows, cols] of the blocks of every layer, by layer and shape. Raises UsageError when a block fits no layer.

    M-FAC is damped by the mean squared gradient: M-FAC itself leaves the constant to its user, GPTQ (arXiv 2210.17323)
    takes a share of the mean diagonal, which for a Fisher matrix is just that.
    """
    for name, layer in gradients.layers.items():
        for block in blocks:
            require_fit(name, (layer.out_features, layer.in_features), block)
    score = block_fisher if method == "fisher" else partial(mfac_saliency, damping=gradients.mean_square)
    height = math.lcm(*(block[0] for block in blocks))
    total, done = sum(layer.out_features for layer in gradients.layers.values()), 0
    parts: dict[tuple[str, Block], list[Tensor]] = {(name, block): [] for name in gradients.layers for block in blocks}
    for name, rows, g in gradients.stream(dict.fromkeys(gradients.layers, height)):
        weight = gradients.layers[name].weight.detach()[rows].to(g)
        for block in blocks:
            parts[name, block].append(score(weight, g, block).cpu())
        done += len(weight)
        tell(done, total, name)
    return {key: torch.cat(scores) for key, scores in parts.items()}


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
