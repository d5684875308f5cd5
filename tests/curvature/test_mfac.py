"""M-FAC against the dense inverse: in float64, and with 60 digits where float64 is not enough for the oracle itself."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from torch import Tensor, nn

from lpvit_cli.curvature import mfac
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


def ill_conditioned(kind: str, m: int, d: int) -> Tensor:
    """Gradients [m, d]: `rows` or `columns` of sizes from 1 to 10^6, every row there twice (`repeated`), or all in a plane."""
    generator = torch.Generator().manual_seed(m)
    g = torch.randn(m, d, generator=generator, dtype=torch.float64)
    sizes = 10 ** (6 * torch.rand(max(m, d), generator=generator, dtype=torch.float64))
    return {
        "rows": lambda: g * sizes[:m, None],
        "columns": lambda: g * sizes[:d],
        "repeated": lambda: g[torch.arange(m) // 2],
        "plane": lambda: torch.randn(m, 2, generator=generator, dtype=torch.float64) @ g[:2],
    }[kind]()


def exact_fisher(g: Tensor, damping: float):  # type: ignore[no-untyped-def]
    g_exact = mp.matrix(g.tolist())
    return g_exact.T * g_exact / len(g) + mp.mpf(damping) * mp.eye(g.shape[1])


def as_tensor(matrix) -> Tensor:  # type: ignore[no-untyped-def]
    return torch.tensor(matrix.tolist(), dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-2, 1e-8])
@pytest.mark.parametrize(("m", "d"), [(3, 12), (8, 8), (14, 8)])
@pytest.mark.parametrize("kind", ["rows", "columns", "repeated", "plane"])
def test_ill_conditioned_fisher_matrices(kind: str, m: int, d: int, damping: float) -> None:
    """Condition numbers of F up to 10^20: the factor must not see more than their root, 10^10, times the rounding of 10^-16."""
    g = ill_conditioned(kind, m, d)
    fisher = FisherInverse(g, damping)
    v = torch.randn(d, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with mp.workdps(60):
        inverse = exact_fisher(g, damping) ** -1
        product, inverse = as_tensor(inverse * mp.matrix(v.tolist())), as_tensor(inverse)
    assert relative(fisher.product(v), product) < 1e-8
    elements = torch.tensor([[fisher.element(i, j) for j in range(d)] for i in range(d)], dtype=torch.float64)
    assert relative(elements, inverse) < 1e-8


@pytest.mark.parametrize("size", [2, 5, 9, 12])
@pytest.mark.parametrize("kind", ["rows", "columns", "repeated", "plane"])
@pytest.mark.parametrize("m", [3, 14])
def test_blocks_of_any_size_where_the_fisher_matrix_is_ill_conditioned(m: int, kind: str, size: int) -> None:
    """([F^-1]_QQ)^-1 for blocks smaller and larger than the rest and than m: condition numbers of F up to 10^13."""
    g = ill_conditioned(kind, m, 12)
    fisher = FisherInverse(g, 1e-2)
    indices = torch.arange(size) * 7 % 12
    w = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with mp.workdps(60):
        inverse = exact_fisher(g, 1e-2) ** -1
        block = mp.matrix([[inverse[i, j] for j in indices.tolist()] for i in indices.tolist()])
        solved = block**-1 * mp.matrix(w.tolist())
        columns = mp.matrix([[inverse[i, j] for j in indices.tolist()] for i in range(12)])
        move, solved = -as_tensor(columns * solved)[:, 0], as_tensor(solved)[:, 0]
    assert fisher.block_saliency(indices, w) == pytest.approx(float(w @ solved) / 2, rel=1e-6)
    assert relative(fisher.block_update(indices, w), move) < 1e-4


def of_condition(shape: str, condition: float, m: int = 40, d: int = 150) -> tuple[Tensor, float]:
    """Float32 gradients [m, d] and a damping with `condition` the largest eigenvalue of F over the damping: `random`, nearly
    `parallel` or `repeated` ones, or of singular values that `fall` to 10^-4 of the first."""
    generator = torch.Generator().manual_seed(m)
    g = torch.randn(m, d, generator=generator, dtype=torch.float64)
    if shape == "parallel":
        g = g[:1] + 0.01 * g
    if shape == "repeated":
        g = g[torch.arange(m) % 5]
    if shape == "falling":
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        g = u * torch.logspace(0, -4, m, dtype=torch.float64) @ v
    g = g.float()
    largest = float(torch.linalg.svdvals(g.double())[0]) ** 2 / m
    return g, largest / (condition - 1)


@pytest.mark.parametrize("condition", [2.0, 1e3, 9e6, 1.1e7, 1e10, 1e14])
@pytest.mark.parametrize("shape", ["random", "parallel", "repeated", "falling"])
def test_the_quick_set_up_is_taken_where_it_keeps_its_digits(
    shape: str, condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, damping = of_condition(shape, condition)
    slow = []
    by_qr = mfac._by_qr
    monkeypatch.setattr(mfac, "_by_qr", lambda g: slow.append(1) or by_qr(g))
    fisher = FisherInverse(g, damping)
    assert bool(slow) == (condition > mfac.WELL_CONDITIONED)
    generator = torch.Generator().manual_seed(3)
    # x wherever it may point, and within the gradients' span, where F^-1 x is smallest beside x / damping
    x = torch.cat([torch.randn(150, 2, generator=generator), g.T @ torch.randn(40, 2, generator=generator)], dim=1).double()
    _, s, v = torch.linalg.svd(g.double(), full_matrices=True)
    values = torch.cat([s.square() / 40 + damping, torch.full((110,), damping, dtype=torch.float64)])
    inverse = v.T / values @ v
    lost = 1e-12 + 1e-15 * min(condition, 1e7)
    assert relative(fisher.product(x[:, :2]), inverse @ x[:, :2]) < lost
    assert relative(fisher.diag(), inverse.diagonal()) < lost
    if not slow:
        assert relative(fisher.product(x[:, 2:]), inverse @ x[:, 2:]) < 20 * lost


@pytest.mark.parametrize("condition", [2.0, 1e3, 9e6])
@pytest.mark.parametrize("shape", ["random", "parallel", "repeated", "falling"])
@pytest.mark.parametrize("size", [10, 60, 120])
def test_the_quick_set_up_gives_the_same_blocks(shape: str, condition: float, size: int) -> None:
    """As the slow one does: blocks below m, above it, and larger than the rest."""
    g, damping = of_condition(shape, condition)
    quick = FisherInverse(g, damping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mfac, "WELL_CONDITIONED", 0.0)
        slow = FisherInverse(g, damping)
    generator = torch.Generator().manual_seed(4)
    indices = torch.randperm(150, generator=generator)[:size]
    w = torch.randn(size, generator=generator, dtype=torch.float64)
    assert quick.block_saliency(indices, w) == pytest.approx(slow.block_saliency(indices, w), rel=1e-12 + 1e-15 * condition)
    assert relative(quick.block_update(indices, w), slow.block_update(indices, w)) < 1e-12 + 1e-15 * condition


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "d"), [(3, 5000), (130, 140), (64, 65), (65, 2049)])
def test_the_quick_set_up_by_parts_misses_none(m: int, d: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mfac, "_by_qr", lambda g: pytest.fail("took the slow one"))
    g = gradients(m, d).to(dtype)
    fisher = FisherInverse(g, 0.5)
    x = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    g = g.double()
    solved = torch.linalg.solve(0.5 * m * torch.eye(m, dtype=torch.float64) + g @ g.T, g @ x)
    assert relative(fisher.product(x), (x - g.T @ solved) / 0.5) < 1e-11


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_tiny_and_huge_gradients_of_single_precision_are_no_special_case(size: float) -> None:
    g = gradients(6, 30).float() * size
    damping = 0.1 * size**2
    fisher, x = FisherInverse(g, damping), torch.randn(30, dtype=torch.float64)
    assert relative(fisher.product(x) * size**2, dense(g.double() / size, 0.1) @ x) < 1e-6
    assert relative(FisherInverse(torch.zeros(2, 5), 0.5).diag(), torch.full((5,), 2.0)) < 1e-15


@pytest.mark.parametrize(("m", "d", "damping"), CASES)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_diagonal_is_that_of_the_dense_inverse(m: int, d: int, damping: float, scale: float) -> None:
    g = gradients(m, d, scale)
    fisher, expected = FisherInverse(g, damping), dense(g, damping).diagonal()
    diagonal = fisher.diag()
    assert diagonal.dtype == torch.float64
    assert relative(diagonal, expected) < tolerance(g, damping)
    assert diagonal.tolist() == pytest.approx([fisher.element(i, i) for i in range(d)], rel=1e-9, abs=1e-13 / damping)
    sliding = SlidingFisherInverse(m, d, damping, dtype=torch.float64)
    assert relative(sliding.diag(), torch.full((d,), 1 / damping)) < 1e-14  # nothing pushed
    for n, row in enumerate([*g, *g[: m // 2]], start=1):  # some go round
        sliding.push(row)
        if n == m // 2:
            early = torch.cat([g[:n], torch.zeros(m - n, d, dtype=torch.float64)])
            assert relative(sliding.diag(), dense(early, damping).diagonal()) < tolerance(g, damping)
    assert sliding.diag().dtype == torch.float64
    assert relative(sliding.diag(), expected) < tolerance(g, damping)


def test_the_diagonal_of_more_weights_than_are_worked_on_at_a_time() -> None:
    g = gradients(3, 5000).float()
    fisher, sliding = FisherInverse(g, 0.2), SlidingFisherInverse(3, 5000, 0.2)
    for row in g:
        sliding.push(row)
    places = [0, 2047, 2048, 4999]
    expected = [fisher.element(i, i) for i in places]
    assert fisher.diag()[places].tolist() == pytest.approx(expected, rel=1e-12)
    assert sliding.diag()[places].tolist() == pytest.approx(expected, rel=1e-12)
    assert fisher.diag().shape == sliding.diag().shape == (5000,)


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


def test_the_latest_product_keeps_its_digits_in_single_precision() -> None:
    """F^-1 g is small along the gradients themselves: with damping 1e-8, subtracting it from g / damping would leave noise."""
    fisher = SlidingFisherInverse(4, 10, 1e-8)
    stream = gradients(7, 10).float()
    for n, g in enumerate(stream, start=1):
        fisher.push(g)
        latest = stream[max(0, n - 4) : n].double()
        padded = torch.cat([latest, torch.zeros(4 - len(latest), 10, dtype=torch.float64)])
        with mp.workdps(60):
            expected = as_tensor(exact_fisher(padded, 1e-8) ** -1 * mp.matrix(g.double().tolist()))[:, 0]
        assert relative(fisher.latest_product(), expected) < 1e-5


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


class Quadratic:
    """The loss 1/2 (x - target)^T A (x - target), eigenvalues of A [10, 10] from 1e-2 to 1e2, x in two parameters.

    Starts at x = 0. Its gradients have noise A^1/2 z, z normal: at the target their Fisher matrix is A.
    """

    def __init__(self, *dtypes: torch.dtype):
        self.generator = torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(self.normal(10, 10))
        self.root = basis * torch.logspace(-1, 1, 10, dtype=torch.float64)
        self.target = torch.linalg.solve(
            self.root.T, torch.ones(10, dtype=torch.float64)
        )  # every eigenvector adds the same loss
        first, second = dtypes
        self.parameters = [nn.Parameter(torch.zeros(2, 3, dtype=first)), nn.Parameter(torch.zeros(4, dtype=second))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def x(self) -> Tensor:
        return torch.cat([p.detach().flatten().double() for p in self.parameters])

    def backward(self, signal: float = 1.0, noise: float = 1.0) -> Tensor:
        """Leaves the gradient in the parameters; returns it as they hold it."""
        gradient = self.root @ (signal * (self.root.T @ (self.x() - self.target)) + noise * self.normal(10))
        for p, part in zip(self.parameters, gradient.split([6, 4]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)
        return torch.cat([p.grad.flatten().double() for p in self.parameters])


DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_step_is_that_of_the_dense_inverse(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    task = Quadratic(*dtypes)
    groups = [{"params": [task.parameters[0]], "lr": 0.02}, {"params": [task.parameters[1]], "weight_decay": 0.1}]
    optimizer = MFAC(groups, lr=0.01, window=3, damping=0.1)
    lr = torch.tensor([0.02] * 6 + [0.01] * 4, dtype=torch.float64)
    decay = torch.tensor([0.0] * 6 + [0.1] * 4, dtype=torch.float64)
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    window_rounding = 1e-9 if rounding < 1e-9 else 1e-5  # in single precision at least, of gradients that are nearly parallel
    seen = [torch.zeros(10, dtype=torch.float64)] * 3
    for _ in range(5):
        before = task.x()
        seen.append(task.backward())
        optimizer.step()
        expected = before * (1 - lr * decay) - lr * (dense(torch.stack(seen[-3:]), 0.1) @ seen[-1])
        assert relative(task.x(), expected) < rounding / 2 + window_rounding


def test_a_window_that_knows_the_curvature_steps_to_the_minimum() -> None:
    """A Newton step, up to the sampling error of m = 200 gradients in d = 10: the eigenvalues of A^1/2 F^-1 A^1/2 lie between
    1 / (1 + sqrt(d/m))^2 and 1 / (1 - sqrt(d/m))^2 (Marchenko and Pastur, 1967). Plain descent shrinks one part of ten."""
    task = Quadratic(torch.float64, torch.float64)
    optimizer = MFAC(task.parameters, lr=0.0, window=200, damping=1e-6)
    for _ in range(199):
        task.backward(signal=0.0)
        optimizer.step()
    task.backward(signal=0.1, noise=0.0)
    optimizer.param_groups[0]["lr"] = 10.0
    optimizer.step()
    left = task.root.T @ (task.x() - task.target)
    assert float(left.norm()) < (1 / (1 - (10 / 200) ** 0.5) ** 2 - 1) * 10**0.5


@pytest.mark.parametrize("steps", [0, 2, 3, 8])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtypes: tuple[torch.dtype, torch.dtype], steps: int, how: str) -> None:
    task = Quadratic(*dtypes)
    optimizer = MFAC(task.parameters, lr=0.01, window=3, damping=1e-3)
    for _ in range(steps):
        task.backward()
        optimizer.step()
    if how == "deepcopy":
        other, resumed = copy.deepcopy((task, optimizer))
    else:
        other = copy.deepcopy(task)
        resumed = MFAC(other.parameters, lr=1.0, window=3, damping=1e-3)
        resumed.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        assert torch.equal(task.backward(), other.backward())
        optimizer.step()
        resumed.step()
        assert torch.equal(task.x(), other.x())
    assert int(resumed.state[other.parameters[0]]["step"]) == steps + 4


def test_a_gradient_that_is_no_number_spoils_the_weights_but_not_the_window() -> None:
    task = Quadratic(torch.float32, torch.float32)
    optimizer = MFAC(task.parameters, lr=0.01, window=3)
    task.backward()
    task.parameters[1].grad[2] = float("nan")
    optimizer.step()
    assert task.x().isnan().any()
    assert optimizer.fisher.pushed == 0
    assert not optimizer.fisher.gradients.any()
