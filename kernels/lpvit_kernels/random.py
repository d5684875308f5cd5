"""Random block-sparse matrices, for tests and benchmarks."""

from __future__ import annotations

import torch

from lpvit_kernels.matrix import BlockSparseMatrix


def random_block_sparse(
    shape: tuple[int, int],
    block: tuple[int, int],
    density: float,
    imbalance: float = 0.0,
    empty_rows: int = 0,
    empty_columns: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BlockSparseMatrix:
    """A weight [out, in] of standard normal values; round(density * all blocks) of its blocks R x C are kept, at random.

    `imbalance` 0 keeps every block with the same probability; at 1, block rows differ by about a factor e. The first
    `empty_rows` block rows and `empty_columns` block columns keep none (the others cannot make up for more than they have).
    The same arguments give the same matrix on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-n // b) for n, b in zip(shape, block, strict=True))
    # The blocks with the largest log weight + Gumbel noise are a weighted sample without replacement.
    gumbel = -torch.log(-torch.log(torch.rand(rows, columns, generator=generator, dtype=torch.float64)))
    score = gumbel + imbalance * torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    score[:empty_rows] = -torch.inf
    score[:, :empty_columns] = -torch.inf
    kept = min(round(density * rows * columns), int(score.isfinite().sum()))
    mask = torch.zeros(rows * columns, dtype=torch.bool)
    mask[score.flatten().topk(kept).indices] = True
    weight = torch.randn(shape, generator=generator)
    return BlockSparseMatrix.from_dense(weight, block, mask.reshape(rows, columns)).to(device, dtype)
