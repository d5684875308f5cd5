"""fisher: blocks by the Fisher matrix of each, made of the gradients of single images, G [m, out, in]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from lpvit_cli import distributed
from lpvit_cli.curvature import ImageGradients, single_images
from lpvit_cli.errors import UsageError
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.blocks import Block, block_sums, require_fit
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.removal import Removal, additive

Score = Callable[[Tensor, Tensor, Block], Tensor]  # weight [out, in], gradients [m, out, in], block -> [rows, cols]
Tell = Callable[[int, int, str], None]  # rows done, rows in all, layer


class BlockFisher(Method):
    """What is kept does not move."""

    scores: Mapping[tuple[str, Block], Tensor] = {}

    @cached_property
    def gradients(self) -> ImageGradients:
        plan = self.plan
        images = single_images(plan.calibration, plan.settings.fisher_images)
        return ImageGradients(plan.model, plan.layers, images, plan.new_loss, plan.device)

    def prepare(self, progress: Progress) -> None:
        if distributed.world() > 1:  # each has a share of the images
            raise UsageError(
                f"prune.method: {self.plan.settings.method} runs in one process, not under torchrun",
                "run prune without torchrun, or choose obs",
            )
        tell = partial(progress, "gradients of single images")
        self.scores = block_scores(self.score, self.gradients, self.plan.settings.blocks, tell)

    @property
    def score(self) -> Score:
        return block_fisher

    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        return additive(self.scores[layer, block])

    def notes(self) -> list[str]:
        asked, found = self.plan.settings.fisher_images, len(self.gradients.images)
        if found >= asked:
            return []
        return [f"gradients of {found} images, fewer than the {asked} of prune.fisher_images: raise calibrate.images"]


def block_fisher(weight: Tensor, gradients: Tensor, block: Block) -> Tensor:
    """1/2 w_Q^T F_QQ w_Q = mean over images of (sum over the block of g w)^2 / 2, [rows, cols] float64; `weight` [out, in],
    `gradients` [m, out, in] (Fisher pruning, Theis et al., arXiv 1801.05787). In units of the per-image loss."""
    return torch.stack([block_sums(g.double() * weight.double(), block).square() for g in gradients]).mean(dim=0) / 2


def block_scores(
    score: Score, gradients: ImageGradients, blocks: tuple[Block, ...], tell: Tell
) -> dict[tuple[str, Block], Tensor]:
    """Scores [rows, cols] of the blocks of every layer, by layer and shape, in one stream of gradients a few rows at a time.

    Raises UsageError when a block fits no layer.
    """
    for name, layer in gradients.layers.items():
        for block in blocks:
            require_fit(name, (layer.out_features, layer.in_features), block)
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
