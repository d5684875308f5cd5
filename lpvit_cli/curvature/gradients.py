"""Gradients of the losses of single images, G [m, out, in] a layer, in bounded memory.

Those of all layers fit nowhere (ViT-B, 128 images: 43 GB), so they are not stored but made again whenever they are asked for: a
few rows of a few layers at a time, each time in one pass over the m images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.tasks.base import Loss

MEMORY_BYTES = 2 * 2**30  # for the gradients that exist at once
BYTES = 4  # float32


@dataclass(frozen=True)
class Piece:
    """Some rows of a layer."""

    layer: str
    rows: slice
    columns: int

    @property
    def weights(self) -> int:
        return (self.rows.stop - self.rows.start) * self.columns


def single_images(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """The first `count` images [1, 3, H, W] of `batches` with their labels [1]; all, if there are fewer."""
    singles = (pair for images, labels in batches for pair in zip(images.split(1), labels.split(1), strict=True))
    return list(islice(singles, count))


@dataclass
class ImageGradients:
    """dL/dW of every image for itself; `images` as of `single_images`.

    `new_loss` makes the loss anew for every pass, so that each draws the same labels. Between passes the model is on
    the CPU, in evaluation mode.
    """

    model: nn.Module
    layers: dict[str, nn.Linear]  # of the model
    images: list[tuple[Tensor, Tensor]]
    new_loss: Callable[[], Loss]
    device: torch.device

    def stream(self, heights: dict[str, int], memory_bytes: int = MEMORY_BYTES) -> Iterator[tuple[str, slice, Tensor]]:
        """Name, rows and G [m, rows, in] (float32, on the device) of the layers in `heights`, so many rows of each at a time.

        The last rows of a layer may be fewer. Each G is valid until the next is asked for. Raises UsageError when one alone
        takes more than `memory_bytes`.
        """
        m = len(self.images)
        groups = _groups(self._pieces(heights), m, memory_bytes)
        buffer = torch.empty(m * max(sum(piece.weights for piece in group) for group in groups), device=self.device)
        for group in groups:
            parts = buffer[: m * sum(piece.weights for piece in group)].split([m * piece.weights for piece in group])
            gathered = [part.view(m, -1, piece.columns) for piece, part in zip(group, parts, strict=True)]
            names = list(dict.fromkeys(piece.layer for piece in group))
            for i, gradients in enumerate(self._of_each_image(names)):
                of = dict(zip(names, gradients, strict=True))
                for piece, g in zip(group, gathered, strict=True):
                    g[i] = of[piece.layer][piece.rows]
            for piece, g in zip(group, gathered, strict=True):
                yield piece.layer, piece.rows, g

    @cached_property
    def mean_square(self) -> float:
        """Mean over images and over the weights of all layers of the squared gradient: the mean of the Fisher's diagonal."""
        total = sum(float(g.double().square().sum()) for of in self._of_each_image(list(self.layers)) for g in of)
        return total / len(self.images) / sum(layer.weight.numel() for layer in self.layers.values())

    def _of_each_image(self, names: list[str]) -> Iterator[tuple[Tensor, ...]]:
        self.model.eval().to(self.device)
        weights = [self.layers[name].weight.requires_grad_() for name in names]
        loss = self.new_loss()
        try:
            for image, label in self.images:
                yield torch.autograd.grad(loss(self.model(image.to(self.device)), label), weights)
        finally:
            self.model.cpu()

    def _pieces(self, heights: dict[str, int]) -> list[Piece]:
        pieces = []
        for name, height in heights.items():
            out, columns = self.layers[name].weight.shape
            pieces += [Piece(name, slice(r, min(r + height, out)), columns) for r in range(0, out, height)]
        return pieces


def _groups(pieces: list[Piece], images: int, memory_bytes: int) -> list[list[Piece]]:
    """Pieces whose gradients fit into memory together, in order."""
    groups: list[list[Piece]] = []
    left = 0
    for piece in pieces:
        size = BYTES * images * piece.weights
        if size > memory_bytes:
            raise UsageError(
                f"prune.fisher_images: {images} gradients of {piece.rows.stop - piece.rows.start} rows of {piece.layer} take "
                f"{size / 1e9:.1f} GB, more than the {memory_bytes / 1e9:.1f} GB there are for them",
                "lower prune.fisher_images, or choose blocks of fewer rows (prune.block)",
            )
        if size > left or not groups:
            groups.append([])
            left = memory_bytes
        groups[-1].append(piece)
        left -= size
    return groups
