"""Blocks of a weight [out, in]: R output features x C input features, ragged at the far edges where they do not divide."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.errors import UsageError

Block = tuple[int, int]


def grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Blocks along out and in."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def require_fit(name: str, shape: tuple[int, int], block: Block) -> None:
    if block[0] > shape[0] or block[1] > shape[1]:
        raise UsageError(
            f"prune.block: {block[0]}x{block[1]} is larger than layer {name} ({shape[0]}x{shape[1]}, out x in)",
            "choose a smaller block, or exclude the layer with prune.layers.exclude",
        )


def block_sums(elements: Tensor, block: Block) -> Tensor:
    """Sum over each block: [out, in] -> [ceil(out/R), ceil(in/C)]."""
    out, columns = elements.shape
    rows, cols = grid((out, columns), block)
    padded = F.pad(elements, (0, cols * block[1] - columns, 0, rows * block[0] - out))
    return padded.reshape(rows, block[0], cols, block[1]).sum(dim=(1, 3))


def block_elements(shape: tuple[int, int], block: Block) -> Tensor:
    """Weights in each block [ceil(out/R), ceil(in/C)] (float64); fewer at ragged edges."""
    return block_sums(torch.ones(shape, dtype=torch.float64), block)


def expand(mask: Tensor, shape: tuple[int, int], block: Block) -> Tensor:
    """A block mask as an element mask [out, in]."""
    return mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
