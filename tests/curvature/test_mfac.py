"""M-FAC against the dense inverse in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lpvit_cli.curvature.mfac import MFAC, FisherInverse, SlidingFisherInverse

CASES = [(1, 5, 0.1), (4, 30, 1e-2), (30, 30, 1.0), (64, 20, 1e-3), (16, 50, 1e-6)]


def gradients(m: int, d: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Rows of very different size when `scale` is large: an ill-conditioned Fisher matrix."""
    generator = torch.Generator().manual_seed(seed)
    sizes = scale ** torch.rand(m, 1, generator=generator, dtype=torch.float64)
    return torch.randn(m, d, generator=generator, dtype=torch.float64) * sizes


def fisher_of(g: Tensor, damping: float) -> Tensor:
    """F [d, d]."""
    return damping * torch.eye(g.shape[1], dtype=torch.float64) + g.T @ g / len(g)


def dense(g: Tensor, damping: float) -> Tensor:
    """F^-1 [d, d] the long way."""
    return torch.linalg.inv(fisher_of(g, damping))


def tolerance(g: Tensor, damping: float) -> float:
    """(v - U^T U v) / lambda loses the digits that v and U^T U v share: rounding (1e-16) grows by max eigenvalue / lambda."""
    return 1e-10 + 1e-15 * float(torch.linalg.eigvalsh(fisher_of(g, damping)).max()) / damping


@pytest.mark.parametrize(("m", "d", "damping"), CASES)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_static_products_and_elements(m: int, d: int, damping: float, scale: float) -> None:
    g = gradients(m, d, scale)
    fisher, inverse = FisherInverse(g, damping), dense(g, damping)
    v = torch.randn(d, 3, dtype=torch.float64)
    assert relative(fisher.product(v), inverse @ v) < tolerance(g, damping)
    assert relative(fisher.product(v[:, 0]), inverse @ v[:, 0]) < tolerance(g, damping)
    elements = torch.tensor([[fisher.element(i, j) for j in range(d)] for i in range(d)], dtype=torch.float64)
    assert relative(elements, inverse) < tolerance(g, damping)


@pytest.mark.parametrize(("m", "d", "damping"), CASES)
def test_block_saliency_is_the_loss_of_the_best_removal(m: int, d: int, damping: float) -> None:
    """Minimise 1/2 x^T F x over all moves x with x_Q = -w_Q: the value is the saliency, the minimiser the update."""
    g = gradients(m, d)
    fisher = FisherInverse(g, damping)
    f = fisher_of(g, damping)
    indices = torch.tensor([0, d // 2, d - 1]).unique()
    w = torch.randn(len(indices), dtype=torch.float64)
    rest = torch.tensor([i for i in range(d) if i not in indices.tolist()])
    move = torch.zeros(d, dtype=torch.float64)
    move[indices] = -w
    if len(rest):
        move[rest] = torch.linalg.solve(f[rest[:, None], rest], f[rest[:, None], indices] @ w)
    assert fisher.block_saliency(indices, w) == pytest.approx(float(move @ f @ move / 2), rel=tolerance(g, damping))
    assert relative(fisher.block_update(indices, w), move) < tolerance(g, damping)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 15), st.floats(1e-3, 10))
def test_the_window_holds_the_latest_gradients(window: int, dim: int, pushes: int, damping: float) -> None:
    fisher = SlidingFisherInverse(window, dim, damping, dtype=torch.float64)
    stream = gradients(15, dim, 10.0)
    for g in stream[:pushes]:
        fisher.push(g)
    latest = stream[max(0, pushes - window) : pushes]
    padded = torch.cat([latest, torch.zeros(window - len(latest), dim, dtype=torch.float64)])
    v = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative(fisher.product(v), dense(padded, damping) @ v) < 1e-8


def test_single_precision_windows_stay_accurate_over_many_replacements() -> None:
    fisher = SlidingFisherInverse(8, 40, 1e-2)
    stream = gradients(300, 40).float()
    for g in stream:
        fisher.push(g)
    v = torch.randn(40)
    assert relative(fisher.product(v), dense(stream[-8:].double(), 1e-2) @ v.double()) < 1e-3


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ValueError, match="damping must be positive"):
        FisherInverse(gradients(2, 3), damping)
    with pytest.raises(ValueError, match="damping must be positive"):
        SlidingFisherInverse(2, 3, damping)


def test_gradients_that_are_no_numbers_are_refused() -> None:
    g = gradients(2, 3)
    g[1, 2] = float("inf")
    with pytest.raises(ValueError, match="must be finite"):
        FisherInverse(g, 0.1)
    fisher = SlidingFisherInverse(2, 3, 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be finite"):
        fisher.push(g[1])
    assert fisher.pushed == 0


def test_the_optimizer_takes_the_preconditioned_step() -> None:
    layer = nn.Linear(3, 2).double()
    start = torch.cat([p.detach().flatten() for p in layer.parameters()])
    optimizer = MFAC(layer.parameters(), lr=0.1, window=2, damping=0.5, weight_decay=0.01)
    layer(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
    g = torch.cat([p.grad.flatten() for p in layer.parameters()])
    optimizer.step()
    expected = start * (1 - 0.1 * 0.01) - 0.1 * dense(torch.stack([g, torch.zeros_like(g)]), 0.5) @ g
    assert relative(torch.cat([p.detach().flatten() for p in layer.parameters()]), expected) < 1e-10
