"""Block OBS: remove blocks of a linear layer in the order of their exact cost, and let the kept weights make up for them.

One block row of R output features shares its mask, and all its rows share the Hessian H of the layer's squared error. With
M = H^-1 restricted to what is kept, removing block Q (columns k) from the rows w costs

    e = 1/2 tr(S w_k (M_kk)^-1 w_k^T)        and moves them by        -w_k (M_kk)^-1 M_k:

(Optimal Brain Surgeon, Hassibi 1993; for layers: Optimal Brain Compression, arXiv 2208.11580). S [R, R] weighs errors of the
outputs and their products, as the output factor of K-FAC (arXiv 1503.05671) does; it changes costs, not the kept weights, since
removed columns span all R rows. The greedy order costs O(in^3) a block row: M is never formed, only the factor U with
M = H^-1 - U^T U that grows by C rows a removal, and M's diagonal blocks.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.pruning.blocks import Block, expand, grid

DAMPING = 1e-2  # of the mean diagonal of H
MASSIVE = 1e3  # times the median of the diagonal
GROUP_BYTES = 2**30  # working memory: as many block rows at a time as fit

_latest: dict[object, tuple[Tensor, Tensor]] = {}  # order and errors that `prune_layer` found last, by all that they depend on


def prune_layer(weight: Tensor, hessian: Tensor, block: Block, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the best `keep` blocks of `weight` [out, in] for the squared error tr(d H d^T) / 2, H = `hessian` [in, in].

    Returns the compensated weight [out, in], the block mask [ceil(out/R), ceil(in/C)], and the errors [removed] float64 of the
    removals in order. All errors are exact for the damped H. Further calls for the same layer, whatever they keep, search no
    new order: the latest one is remembered, by a hash of all numbers in `weight` and `hessian`.
    """
    order, errors = _remembered_order(weight.detach(), hessian.detach(), block)
    flat, steps = merged(order, errors)
    removed = flat.numel() - keep
    mask = torch.ones(flat.numel(), dtype=torch.bool)
    mask[flat[:removed]] = False
    mask = mask.reshape(order.shape)
    return compensated(weight, hessian, mask, block), mask, steps[:removed]


def removal_order(weight: Tensor, hessian: Tensor, block: Block, output_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Greedy order of every block row: block columns [rows, cols] int64, first to go first, and the error of each removal
    [rows, cols] float64, both on the CPU. `output_weights` [out, out]: S above is its block on the diagonal; None: identity.
    """
    out, features = weight.shape
    rows, cols = grid((out, features), block)
    inverse = _inverse(_padded(damped(hessian), cols * block[1]))
    w = F.pad(weight, (0, cols * block[1] - features, 0, rows * block[0] - out)).to(inverse).unflatten(0, (rows, block[0]))
    if output_weights is not None:
        w = _root(output_weights, block[0]).to(inverse) @ w
    group = max(1, GROUP_BYTES // (inverse.numel() * inverse.element_size()))
    parts = []
    for rows_of_group in w.split(group):
        order, errors, failed = _greedy(rows_of_group.clone(), inverse, block[1])
        if failed:  # too ill-conditioned for float32
            order, errors, _ = _greedy(rows_of_group.double(), inverse.double(), block[1])
        parts.append((order, errors))
    return torch.cat([order for order, _ in parts]), torch.cat([errors for _, errors in parts])


def _remembered_order(weight: Tensor, hessian: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """`removal_order`, or what it gave last for just these numbers. Of a layer only digests are kept, and no caller gets the
    tensors themselves."""
    key = (*block, DAMPING, GROUP_BYTES, _identity(weight), _identity(hessian))
    found = _latest.get(key)
    if found is None:
        found = removal_order(weight, hessian, block)
        _latest.clear()
        _latest[key] = found
    return found


def _identity(tensor: Tensor) -> object:
    """Equal for tensors of the same bits in the same place, layout and type only."""
    numbers = tensor.cpu().contiguous().view(torch.uint8).numpy().data
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), hashlib.sha256(numbers).digest()


def merged(order: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """One order for the layer: block rows merged by ascending error, each in its own order. Flat block indices and errors."""
    rows, cols = order.shape
    key = errors.cummax(dim=1).values.flatten().argsort(stable=True)
    return (order + cols * torch.arange(rows)[:, None]).flatten()[key], errors.flatten()[key]


def compensated(weight: Tensor, hessian: Tensor, mask: Tensor, block: Block, wanted: Tensor | None = None) -> Tensor:
    """The least-squares weight for a block mask: for each block row, min over W' zero off the mask of tr((W'-W) H (W'-W)^T).

    The same weights as removing the blocks one after another; solved at once in float64: W'_K = W H_:K (H_KK)^-1. Where the
    inputs have changed to x', H is that of x', and `wanted` = 2/N sum y^T x' [out, in] takes the place of W H, y the outputs
    [tokens, out] that there should be.
    """
    h = damped(hessian.double())
    w = weight.double()
    target = w @ h if wanted is None else wanted + w @ (h - hessian.double())
    new = torch.zeros_like(w)
    patterns, pattern_of = mask.unique(dim=0, return_inverse=True)  # block rows that keep the same share a factor
    for number, columns in enumerate(expand(patterns, (len(patterns), weight.shape[1]), (1, block[1])).to(w.device)):
        kept = columns.nonzero()[:, 0]
        rows = (pattern_of == number).repeat_interleave(block[0])[: len(w)].nonzero()[:, 0].to(w.device)
        if len(kept):
            factor = torch.linalg.cholesky(h[kept[:, None], kept])
            new[rows[:, None], kept] = torch.cholesky_solve(target[rows[:, None], kept].T, factor).T
    return new.to(weight.dtype)


def refitted(weight: Tensor, hessian: Tensor, wanted: Tensor) -> Tensor:
    """The least-squares weight with nothing removed, where the inputs have changed: as `compensated`, all blocks kept."""
    shape = (weight.shape[0], weight.shape[1])
    return compensated(weight, hessian, torch.ones(1, 1, dtype=torch.bool), shape, wanted)


def damped(hessian: Tensor) -> Tensor:
    """H + lambda mean(diag H) I; an input that is always zero gets lambda alone, so that its weights cost next to nothing.

    Inputs of more than MASSIVE times the median do not count in the mean: a few of them, as DINOv3 has, would set a damping
    under which all others vanish.
    """
    diagonal = hessian.diagonal()
    seen = diagonal[diagonal > 0]
    mean = diagonal[diagonal <= MASSIVE * seen.median()].mean() if len(seen) else diagonal.mean()
    return hessian + torch.diag_embed((DAMPING * mean).clamp_min(torch.finfo(hessian.dtype).tiny).expand(len(hessian)))


def _padded(hessian: Tensor, size: int) -> Tensor:
    """Columns beyond the layer's: independent of all others, with weights of zero."""
    extra = size - len(hessian)
    padded = F.pad(hessian, (0, extra, 0, extra))
    padded.diagonal()[len(hessian) :] = hessian.diagonal().mean()
    return padded


def _inverse(hessian: Tensor) -> Tensor:
    """H^-1, factored in float64: conditions multiply there, and it costs little beside the greedy search."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian.double())).to(hessian.dtype)


def _root(weights: Tensor, height: int) -> Tensor:
    """S^1/2 of every block row [rows, R, R] for S [out, out]; eigenvalues, since few gradients leave S singular."""
    size = -(-len(weights) // height) * height
    padded = F.pad(weights.double(), (0, size - len(weights), 0, size - len(weights)))
    blocks = padded.unflatten(1, (-1, height)).unflatten(0, (-1, height)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    values, vectors = torch.linalg.eigh(blocks)
    return values.clamp_min(0).sqrt()[:, :, None] * vectors.mT


def _greedy(w: Tensor, inverse: Tensor, width: int) -> tuple[Tensor, Tensor, bool]:
    """`w` [n, R, in] block rows (changed in place), `inverse` [in, in] -> order and errors [n, cols], and whether a block of M
    was not positive definite any more."""
    n, height, features = w.shape
    cols = features // width
    blocks = torch.arange(features, device=w.device).unflatten(0, (cols, width))
    diagonal = inverse.unflatten(0, (cols, width)).unflatten(2, (cols, width)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    m_diagonal = diagonal.repeat(n, 1, 1, 1)  # [n, cols, C, C]: M_kk of every block
    u = w.new_empty(n, features, features)  # rows 0 .. C * removed are in use
    gone = torch.zeros(n, cols, dtype=torch.bool, device=w.device)
    failed = torch.zeros((), dtype=torch.bool, device=w.device)
    order, errors = [], []
    each = torch.arange(n, device=w.device)
    for step in range(cols):
        factors, info = torch.linalg.cholesky_ex(m_diagonal)
        failed |= (info != 0).any()
        weights = w.unflatten(2, (cols, width)).permute(0, 2, 3, 1)  # [n, cols, C, R]
        costs = torch.linalg.solve_triangular(factors, weights, upper=False).square().sum(dim=(2, 3)) / 2
        cost, chosen = costs.masked_fill(gone, torch.inf).min(dim=1)
        gone[each, chosen] = True
        order.append(chosen)
        errors.append(cost.double())
        k = blocks[chosen]  # [n, C]
        used = u[:, : step * width]
        m_rows = inverse[k] - torch.bmm(used.gather(2, k[:, None].expand(-1, step * width, -1)).mT, used)  # M_k: [n, C, in]
        factor = factors[each, chosen]
        new = torch.linalg.solve_triangular(factor, m_rows, upper=False)
        u[:, step * width : (step + 1) * width] = new
        w_k = w.gather(2, k[:, None].expand(-1, height, -1))
        w -= torch.linalg.solve_triangular(factor, w_k.mT, upper=False).mT @ new
        by_block = new.unflatten(2, (cols, width)).permute(0, 2, 1, 3)  # [n, cols, C, C]
        m_diagonal -= by_block.mT @ by_block
        m_diagonal[gone] = torch.eye(width, dtype=w.dtype, device=w.device)
        w.unflatten(2, (cols, width)).masked_fill_(gone[:, None, :, None], 0)
    return torch.stack(order, dim=1).cpu(), torch.stack(errors, dim=1).cpu(), bool(failed)
