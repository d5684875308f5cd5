"""M-FAC: products with the inverse of a Fisher matrix that is a sum of m rank-one terms (Frantar et al., arXiv 2107.03356).

F = lambda I + (1/m) G^T G with G [m, d] the gradients. F itself [d, d] is never formed; memory is O(m d).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

WELL_CONDITIONED = 1e7  # largest eigenvalue of F / lambda up to which products of gradients leave 9 of 16 digits
COLUMNS, ROWS = 2048, 64  # of the gradients that are worked on at a time


class FisherInverse:
    """F^-1 for a fixed set of gradients [m, d] (static M-FAC): O(d m^2) to set up, O(d m) a product, O(m) an element.

    The paper's recursion gives F^-1 = (I - U^T U) / lambda; here U comes from the singular values s and vectors V of G, so that
    F^-1 = V^T diag(m / (s^2 + m lambda)) V + (I - V^T V) / lambda, in float64 whatever the gradients are. Raises ValueError
    unless damping > 0 and all is finite.
    """

    def __init__(self, gradients: Tensor, damping: float):
        _require_usable(gradients, damping)
        m, d = gradients.shape
        self.damping, self.m = damping, m
        self.s, self.v = _by_gram(gradients, m * damping) or _by_qr(gradients)  # v: [min(m, d), d]
        self.outside = 1 / damping if m < d else 0.0  # eigenvalue of F^-1 outside the span of V; V spans all where m >= d
        self.shift = m / (self.s.square() + m * damping) - self.outside

    def product(self, x: Tensor) -> Tensor:
        """F^-1 x; x and result [d] or [d, n], in float64."""
        x = x.double()
        inside = (self.v @ x).transpose(0, -1) * self.shift
        return self.outside * x + self.v.T @ inside.transpose(0, -1)

    def element(self, i: int, j: int) -> float:
        """[F^-1]_ij."""
        return self.outside * (i == j) + float((self.shift * self.v[:, i]) @ self.v[:, j])

    def diag(self) -> Tensor:
        """The diagonal of F^-1 [d], in float64; O(d m)."""
        return torch.cat([self.shift @ columns.square() for columns in self.v.split(COLUMNS, dim=1)]) + self.outside

    def block_saliency(self, indices: Tensor, w: Tensor) -> float:
        """Loss increase of zeroing the weights w [q] at `indices` [q] while all others adapt: 1/2 w^T ([F^-1]_QQ)^-1 w."""
        return self._removal(indices, w.double())[0]

    def block_update(self, indices: Tensor, w: Tensor) -> Tensor:
        """How all weights [d] move when those at `indices` go: -F^-1 E_Q ([F^-1]_QQ)^-1 w; exactly -w at `indices`."""
        move = self.v.T @ self._removal(indices, w.double())[1]
        move[indices] = -w.double()
        return move

    def _removal(self, indices: Tensor, w: Tensor) -> tuple[float, Tensor]:
        """The saliency of a block Q, and z with V_R^T z the move of the rest R. No solve is larger than m x m.

        A block larger than m goes by ([F^-1]_QQ)^-1 = lambda (I + G_Q^T K_R^-1 G_Q) with K_R = m lambda I + G_R G_R^T.
        """
        v, (rank, dim) = self.v[:, indices], self.v.shape
        if len(indices) <= rank:
            block = (self.shift * v.T) @ v
            block.diagonal().add_(self.outside)
            x = _solve(torch.linalg.cholesky(block), w)
            return float(w @ x) / 2, -self.shift * (v @ x)
        ridge, g = self.m * self.damping, self.s[:, None] * v
        if 2 * len(indices) <= dim:
            factor = torch.linalg.cholesky(torch.diag(self.s.square() + ridge) - g @ g.T)
        else:  # the rest is smaller: factor what it adds, no digits are lost by subtracting
            rest = torch.ones(dim, dtype=torch.bool, device=v.device).index_fill(0, indices, False)
            rows = torch.cat(
                [ridge**0.5 * torch.eye(rank, dtype=v.dtype, device=v.device), (self.s[:, None] * self.v[:, rest]).T]
            )
            factor = torch.linalg.qr(rows, mode="r").R.T
        y = _solve(factor, g @ w)
        return self.damping * float(w @ w + (g @ w) @ y) / 2, self.s * y


class SlidingFisherInverse:
    """F^-1 over the latest `window` gradients (dynamic M-FAC); those not pushed yet count as zero.

    K = m lambda I + G G^T [m, m] is kept up to date in float64: O(d m + m^3) to push a gradient, O(d m + m^2) a product.
    `dtype` is that of the stored gradients.
    """

    def __init__(
        self,
        window: int,
        dim: int,
        damping: float,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if window < 1 or dim < 1:
            raise ValueError(f"window and dim must be positive, got {window} and {dim}")
        self.gradients = torch.zeros(window, dim, dtype=dtype, device=device)
        _require_usable(self.gradients, damping)
        self.damping = damping
        self.k = window * damping * torch.eye(window, dtype=torch.float64, device=device)
        self.factor = torch.linalg.cholesky(self.k)
        self.pushed = 0

    def push(self, gradient: Tensor) -> None:
        """Replace the oldest gradient by this one [d]. Raises ValueError when it is not finite."""
        dim = self.gradients.shape[1]
        if gradient.shape != (dim,) or not bool(gradient.isfinite().all()):
            raise ValueError(f"gradient must be finite [{dim}], got {list(gradient.shape)}")
        self._replace_oldest(gradient)
        self.factor = torch.linalg.cholesky(self.k)

    def refill(self, gradients: Tensor, pushed: int) -> None:
        """Bring a fresh window to where another was: its `gradients` [window, d] and how many had been `pushed`."""
        window = len(self.gradients)
        self.pushed = max(0, pushed - window)
        while self.pushed < pushed:
            self._replace_oldest(gradients[self.pushed % window])
        self.factor = torch.linalg.cholesky(self.k)

    def _replace_oldest(self, gradient: Tensor) -> None:
        row = self.pushed % len(self.gradients)
        self.gradients[row] = gradient
        new = self.gradients[row].double()
        products = torch.stack([g.double() @ new for g in self.gradients])  # one by one: no second copy of all gradients
        products[row] += len(self.gradients) * self.damping
        self.k[row] = self.k[:, row] = products
        self.pushed += 1

    def product(self, v: Tensor) -> Tensor:
        """F^-1 v [d], in the type of v."""
        inner = (self.gradients @ v.to(self.gradients.dtype)).double()
        return (v - self._combined(inner).to(v.dtype)) / self.damping

    def latest_product(self) -> Tensor:
        """F^-1 g [d] for the gradient g pushed last: m G^T K^-1 e, where `product` would subtract nearly equal numbers."""
        window = len(self.gradients)
        unit = torch.zeros(window, dtype=torch.float64, device=self.k.device)
        unit[(self.pushed - 1) % window] = window
        return self._combined(unit)

    def diag(self) -> Tensor:
        """The diagonal of F^-1 [d], in float64; O(d m^2), unlike a product."""
        solved = (
            torch.linalg.solve_triangular(self.factor, columns.double(), upper=False)
            for columns in self.gradients.split(COLUMNS, dim=1)
        )
        return (1 - torch.cat([u.square().sum(dim=0) for u in solved])) / self.damping

    def _combined(self, x: Tensor) -> Tensor:
        """G^T K^-1 x for x [m] in float64."""
        return self.gradients.T @ _solve(self.factor, x).to(self.gradients.dtype)


class MFAC(torch.optim.Optimizer):
    """SGD on gradients preconditioned by the inverse Fisher of the latest `window` gradients of all parameters together.

    The window takes window x parameters x 4 bytes and is the state: `gradients` [window, *shape] and `step` of each parameter.
    A step is up to lr x window / ||g|| long where gradients are nearly orthogonal: a longer window wants a smaller lr.
    A gradient that is not finite spoils the parameters, as in other optimizers, and stays out of the window.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self, params, lr: float = 1e-3, window: int = 128, damping: float = 1e-4, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "window": window, "damping": damping})
        self._open_window()

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        placed = [(group, p) for group in self.param_groups for p in group["params"]]
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in placed])
        update = gradient
        if bool(gradient.isfinite().all()):
            self.fisher.push(gradient)
            update = self.fisher.latest_product()
        for (group, p), move in zip(placed, update.split([p.numel() for _, p in placed]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move.view_as(p), alpha=group["lr"])
            self.state[p]["step"].fill_(self.fisher.pushed)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:  # also how torch loads a state_dict and copies an optimizer
        super().__setstate__(state)
        self._open_window()

    def _open_window(self) -> None:
        """The window of what `state` holds, and `state` as views of it."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        window, damping = self.param_groups[0]["window"], self.param_groups[0]["damping"]
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        sizes = [p.numel() for p in parameters]
        self.fisher = SlidingFisherInverse(window, sum(sizes), damping, dtype, parameters[0].device)
        if self.state:
            held = [self.state[p]["gradients"].reshape(window, -1) for p in parameters]
            self.fisher.refill(torch.cat(held, dim=1), int(self.state[parameters[0]]["step"]))
        for p, columns in zip(parameters, self.fisher.gradients.split(sizes, dim=1), strict=True):
            self.state[p] = {"gradients": columns.view(window, *p.shape), "step": torch.tensor(self.fisher.pushed)}


def _by_gram(gradients: Tensor, ridge: float) -> tuple[Tensor, Tensor] | None:
    """s [m] and V [m, d] of G by the eigenvalues of G G^T, or None where they would not be good enough.

    G G^T has the square of G's condition number, but only what it loses beside the ridge counts: the rounding times the largest
    eigenvalue over the ridge. Where s is next to nothing it is raised and V made shorter, with diag(s) V as it is: V
    is orthonormal as far as F^-1 can tell. The work is three matrix products, each a part of the columns at a time.
    """
    m, d = gradients.shape
    if m >= d:
        return None
    products = torch.zeros(m, m, dtype=torch.float64, device=gradients.device)  # the lower triangle of G G^T
    for columns in gradients.split(COLUMNS, dim=1):
        g = columns.double()
        for last in range(ROWS, m + ROWS, ROWS):
            products[last - ROWS : last, :last] += g[last - ROWS : last] @ g[:last].T
    products /= ridge
    if not bool(products.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(products)
    if values[-1] > WELL_CONDITIONED:
        return None
    s = (ridge * values.clamp_min(torch.finfo(values.dtype).eps)).sqrt()
    rows, v = (vectors / s).T, gradients.new_empty(m, d, dtype=torch.float64)
    for columns, part in zip(gradients.split(COLUMNS, dim=1), v.split(COLUMNS, dim=1), strict=True):
        torch.mm(rows, columns.double(), out=part)
    return s, v


def _by_qr(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """s [min(m, d)] and V [min(m, d), d] of G, which sees the condition number of G, the root of that of G G^T."""
    q, r = torch.linalg.qr(gradients.double().T)
    p, s, _ = torch.linalg.svd(r, full_matrices=False)
    return s, (q @ p).T


def _solve(factor: Tensor, x: Tensor) -> Tensor:
    """K^-1 x for K = factor factor^T, the factor lower triangular."""
    return torch.cholesky_solve(x[:, None], factor)[:, 0]


def _require_usable(gradients: Tensor, damping: float) -> None:
    if gradients.ndim != 2 or 0 in gradients.shape or not bool(gradients.isfinite().all()):
        raise ValueError(f"gradients must be finite [m, d], got {list(gradients.shape)}")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
