"""M-FAC: products with the inverse of a Fisher matrix that is a sum of m rank-one terms (Frantar et al., arXiv 2107.03356).

F = lambda I + (1/m) G^T G with G [m, d] the gradients. All goes through the m x m matrix K = m lambda I + G G^T, kept and
factored in float64; F itself [d, d] is never formed. Memory is O(m d).
"""

from __future__ import annotations

import torch
from torch import Tensor


class FisherInverse:
    """F^-1 for a fixed set of gradients [m, d] (static M-FAC): O(d m^2) to set up, O(d m) a product, O(m) an element.

    With K = L L^T and U = L^-1 G: F^-1 = (I - U^T U) / lambda. Raises ValueError unless damping > 0 and all is finite.
    """

    def __init__(self, gradients: Tensor, damping: float):
        _require_usable(gradients, damping)
        self.gradients, self.damping = gradients, damping
        self.k = _kernel(gradients, damping)
        factor = torch.linalg.cholesky(self.k)
        self.u = torch.linalg.solve_triangular(factor, gradients.double(), upper=False)

    def product(self, v: Tensor) -> Tensor:
        """F^-1 v; v and result [d] or [d, n], in float64."""
        v = v.double()
        return (v - self.u.T @ (self.u @ v)) / self.damping

    def element(self, i: int, j: int) -> float:
        """[F^-1]_ij."""
        return (float(i == j) - float(self.u[:, i] @ self.u[:, j])) / self.damping

    def block_saliency(self, indices: Tensor, w: Tensor) -> float:
        """Loss increase of zeroing the weights w [q] at `indices` [q] while all others adapt: 1/2 w^T ([F^-1]_QQ)^-1 w."""
        return float(w.double() @ self._within(indices, w)) / 2

    def block_update(self, indices: Tensor, w: Tensor) -> Tensor:
        """How all weights [d] move when those at `indices` go: -F^-1 E_Q ([F^-1]_QQ)^-1 w; exactly -w at `indices`."""
        v = torch.zeros(self.u.shape[1], dtype=torch.float64, device=self.u.device)
        v[indices] = self._within(indices, w)
        return -self.product(v)

    def _within(self, indices: Tensor, w: Tensor) -> Tensor:
        """([F^-1]_QQ)^-1 w = lambda (w + G_Q^T (K - G_Q G_Q^T)^-1 G_Q w): an m x m solve, whatever the block's size."""
        g, w = self.gradients[:, indices].double(), w.double()
        factor = torch.linalg.cholesky(self.k - g @ g.T)
        return self.damping * (w + g.T @ torch.cholesky_solve((g @ w)[:, None], factor)[:, 0])


class SlidingFisherInverse:
    """F^-1 over the latest `window` gradients (dynamic M-FAC); those not pushed yet count as zero.

    O(d m + m^3) to push a gradient, O(d m + m^2) a product; `dtype` is that of the stored gradients.
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
        self.k = _kernel(self.gradients, damping)
        self.pushed = 0

    def push(self, gradient: Tensor) -> None:
        """Replace the oldest gradient by this one [d]. Raises ValueError when it is not finite."""
        window, dim = self.gradients.shape
        if gradient.shape != (dim,) or not bool(gradient.isfinite().all()):
            raise ValueError(f"gradient must be finite [{dim}], got {list(gradient.shape)}")
        row = self.pushed % window
        self.gradients[row] = gradient
        products = (self.gradients @ self.gradients[row]).double()
        products[row] += window * self.damping
        self.k[row] = self.k[:, row] = products
        self.factor = torch.linalg.cholesky(self.k)
        self.pushed += 1

    def product(self, v: Tensor) -> Tensor:
        """F^-1 v [d], in the type of v."""
        if self.pushed == 0:
            return v / self.damping
        inner = (self.gradients @ v.to(self.gradients.dtype)).double()
        solved = torch.cholesky_solve(inner[:, None], self.factor)[:, 0]
        return (v - (self.gradients.T @ solved.to(self.gradients.dtype)).to(v.dtype)) / self.damping


class MFAC(torch.optim.Optimizer):
    """SGD on gradients preconditioned by the inverse Fisher of the latest `window` gradients of all parameters together."""

    def __init__(  # type: ignore[no-untyped-def]
        self, params, lr: float = 1e-3, window: int = 32, damping: float = 1e-4, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        parameters = [p for group in self.param_groups for p in group["params"]]
        size = sum(p.numel() for p in parameters)
        self.fisher = SlidingFisherInverse(window, size, damping, parameters[0].dtype, parameters[0].device)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        placed = [(group, p) for group in self.param_groups for p in group["params"]]
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for _, p in placed])
        self.fisher.push(gradient)
        update = self.fisher.product(gradient)
        for (group, p), move in zip(placed, update.split([p.numel() for _, p in placed]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move.view_as(p), alpha=group["lr"])
        return loss


def _kernel(gradients: Tensor, damping: float) -> Tensor:
    """K = m lambda I + G G^T [m, m] float64."""
    g = gradients.double()
    return g @ g.T + len(g) * damping * torch.eye(len(g), dtype=torch.float64, device=g.device)


def _require_usable(gradients: Tensor, damping: float) -> None:
    if gradients.ndim != 2 or 0 in gradients.shape or not bool(gradients.isfinite().all()):
        raise ValueError(f"gradients must be finite [m, d], got {list(gradients.shape)}")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
