"""One merge: the most similar pairs of tokens become one token each (ToMe, arXiv 2210.09461).

Tokens after the prefix are told in turn to two sides. Each token of the first has a nearest one on the second, by cosine; the
`r` pairs that are nearest become one token, the mean weighted by how many patches each of the two stands for. `r` follows from
the number of tokens, so shapes are static; there is no state and no parameter, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Matching:
    """Which of n tokens stay and which are merged; int64, for each image."""

    order: Tensor  # [batch, n]: the tokens that stay, those into which others go last of them; then the r that go
    to: Tensor  # [batch, r]: where they go, counted from the first token into which others go
    receivers: int

    def places(self) -> Tensor:
        """[batch, n]: where each token is afterwards."""
        batch, n = self.order.shape
        stay = n - self.to.shape[1]
        there = torch.arange(stay, device=self.to.device).expand(batch, stay)
        after = torch.cat([there, self.to + stay - self.receivers], 1)
        return torch.zeros_like(self.order).scatter(1, self.order, after)


def match(x: Tensor, prefix: int, r: int) -> Matching:
    """The `r` most similar pairs, at least one, of the tokens x [batch, n, width] after the first `prefix`; in float32 at
    least, under autocast too."""
    batch, n, _ = x.shape
    with torch.no_grad(), _exact(x):
        unit = _wide(x)
        unit = unit * torch.rsqrt((unit * unit).sum(-1, keepdim=True).clamp(min=1e-12))
        scores = unit[:, prefix::2] @ unit[:, prefix + 1 :: 2].transpose(1, 2)
        givers, receivers = scores.shape[1:]
        nearest = scores.amax(-1).topk(givers, dim=-1).indices  # all of them: topk keeps the order in every runtime
        go, rest = nearest[:, :r], nearest[:, r:]
        first = torch.arange(prefix, device=x.device).expand(batch, prefix)
        second = torch.arange(prefix + 1, n, 2, device=x.device).expand(batch, receivers)
        order = torch.cat([first, rest * 2 + prefix, second, go * 2 + prefix], 1)
        return Matching(order, scores.argmax(-1).gather(1, go), receivers)


def _exact(x: Tensor) -> torch.autocast:
    """Computes in the types that tensors have."""
    return torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class TokenMerge(nn.Module):
    """Merges `fraction` of the tokens after the first `prefix`, at most half of them."""

    def __init__(self, prefix: int, fraction: float):
        super().__init__()
        self.prefix, self.fraction = prefix, fraction

    def removed(self, n: int) -> int:
        """How many of `n` tokens go."""
        return min(round(self.fraction * (n - self.prefix)), (n - self.prefix) // 2)

    def forward(
        self, x: Tensor, size: Tensor, places: Tensor | None = None, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens x [batch, n, width], how many patches each stands for, size [batch, n, 1] float32, and, where it is
        wanted, at which token each patch of the image is, places [batch, patches]; all three after the merge.

        `like` [batch, n, any width]: tokens whose similarity counts instead of that of x.
        """
        if not (r := self.removed(x.shape[1])):
            return x, size, places
        found = match(x if like is None else like, self.prefix, r)
        stay = x.shape[1] - r
        alone = stay - found.receivers
        where = torch.arange(found.receivers, device=x.device).unsqueeze(-1)
        goes_to = (found.to.unsqueeze(1) == where).to(_wide(x).dtype)  # [batch, receivers, r]

        def folded(tokens: Tensor) -> Tensor:
            return torch.cat([tokens[:, :alone], tokens[:, alone:stay] + goes_to @ tokens[:, stay:]], 1)

        with _exact(x):  # sums of sizes have to be exact, and float16 is soon too small
            after = folded(take(size, found.order))
            merged = folded(take(_wide(x) * size, found.order)) / after
        return merged.to(x.dtype), after, None if places is None else found.places().gather(1, places)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x [batch, n, width] at index [batch, m], by one flat gather, which runtimes do faster than one per image."""
    batch, n, width = x.shape
    rows = (index + torch.arange(batch, device=x.device).unsqueeze(1) * n).reshape(-1)
    return x.reshape(batch * n, width).index_select(0, rows).reshape(batch, -1, width)
