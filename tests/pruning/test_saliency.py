"""Curves against the loss expansion written out with whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import random_statistics, relative

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.errors import UsageError
from lpvit_cli.pruning.blocks import block_elements, block_sums, expand, grid, require_fit
from lpvit_cli.pruning.methods.lpvit import lpvit
from lpvit_cli.pruning.methods.magnitude import magnitude
from lpvit_cli.pruning.methods.obs import obs
from lpvit_cli.pruning.methods.taylor import taylor
from lpvit_cli.pruning.methods.wanda import wanda
from lpvit_cli.pruning.removal import Removal

Block = tuple[int, int]


def by_size(weight: torch.Tensor, statistics: LayerStatistics, block: Block) -> Removal:
    return magnitude(weight, block)


METHODS = {"magnitude": by_size, "wanda": wanda, "taylor": taylor, "lpvit": lpvit, "obs": obs}
CASES = [((12, 16), (4, 4)), ((12, 16), (12, 4)), ((10, 15), (4, 6)), ((7, 5), (1, 1)), ((6, 8), (6, 8))]


def weight_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_lpvit_curve_is_the_second_order_expansion(shape: tuple[int, int], block: tuple[int, int]) -> None:
    """D(k) = sum over removed blocks of |g w| + 1/2 sum_r T S_r d_r (H/2) d_r^T, d all weights removed so far."""
    weight, statistics = weight_of(shape), random_statistics(*shape)
    removal = METHODS["lpvit"](weight, statistics, block)
    w, g = weight.double(), statistics.mean_gradient.double()
    fisher = (statistics.A / statistics.tokens).double()
    scale = statistics.tokens_per_image * statistics.output_moment.diagonal().double()
    for k in range(len(removal.order) + 1):
        gone = ~expand(removal.mask(k), shape, block)
        d = w * gone
        first = (block_sums(g * w, block).abs() * ~removal.mask(k)).sum()
        expected = first + 0.5 * (scale * torch.einsum("ri,ij,rj->r", d, fisher, d)).sum()
        assert float((removal.distortion[k] - expected).abs()) < 1e-5 * float(1 + expected)


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_additive_scores(method: str, shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight, statistics = weight_of(shape), random_statistics(*shape)
    removal = METHODS[method](weight, statistics, block)
    rows, columns = grid(shape, block)
    score = []
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            w, g = weight[at].double(), statistics.mean_gradient[at].double()
            score.append(w.square().sum() if method == "magnitude" else (w * g).sum().abs())
    score = torch.stack(score)
    assert relative(removal.distortion[1:], score.sort().values.cumsum(0)) < 1e-6
    assert sorted(removal.order.tolist()) == list(range(rows * columns))


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_follows_the_order_of_the_curve(method: str) -> None:
    removal = METHODS[method](weight_of((12, 16)), random_statistics(12, 16), (4, 4))
    gone = set()
    for k, block in enumerate(removal.order.tolist(), start=1):
        gone.add(block)
        assert set((~removal.mask(k)).flatten().nonzero()[:, 0].tolist()) == gone


def test_cost_along_the_order_counts_ragged_blocks() -> None:
    shape, block = (10, 15), (4, 6)
    removal = METHODS["magnitude"](weight_of(shape), random_statistics(*shape), block)
    kept = removal.along(block_elements(shape, block))
    assert kept.dtype == block_elements(shape, block).dtype == torch.float64
    for k in range(len(removal.order) + 1):
        assert float(kept[k]) == int(expand(removal.mask(k), shape, block).sum())
    assert float(kept[0]) == 150
    assert float(kept[-1]) == 0


def test_lpvit_removes_in_the_order_of_the_taylor_score() -> None:
    weight, statistics = weight_of((12, 16)), random_statistics(12, 16)
    orders = [METHODS[method](weight, statistics, (4, 4)).order.tolist() for method in ("lpvit", "taylor", "magnitude")]
    assert orders[0] == orders[1] != orders[2]


def test_blocks_that_differ_less_than_float32_can_tell_are_ordered() -> None:
    weight = torch.tensor([[1.0, 1e-5, 1.0, 0.0]])  # squares sum to 1 + 1e-10 and to 1
    assert METHODS["magnitude"](weight, random_statistics(1, 4), (1, 2)).order.tolist() == [1, 0]


@pytest.mark.parametrize("block", [(64, 32), (32, 65), (33, 64)])
def test_block_larger_than_layer(block: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"{block[0]}x{block[1]} is larger than layer blocks.0 \(32x64, out x in\)"):
        require_fit("blocks.0", (32, 64), block)


def test_a_block_may_be_the_whole_layer() -> None:
    require_fit("blocks.0", (32, 64), (32, 64))
    assert METHODS["magnitude"](weight_of((32, 64)), random_statistics(32, 64), (32, 64)).order.tolist() == [0]
