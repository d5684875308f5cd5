"""What a task is: what "as good as before" means for a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.devices import autocast

Batches = Iterable[tuple[Tensor, Tensor]]  # images [n, C, H, W], labels [n] (of no meaning where a task needs none)
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs [n, ...], labels [n] -> sum over the n images


class Score(ABC):
    """Gathers, batch by batch, how good outputs are; of several processes, those of all."""

    @abstractmethod
    def add(self, outputs: Tensor, reference: Tensor | None, labels: Tensor) -> None:
        """Outputs [n, ...] of some images, what the dense model says of them, and their labels [n] (-1: none). On the CPU."""

    @abstractmethod
    def quality(self) -> Any:
        """The quality (tasks/quality.py) of all that was added."""


class Task(ABC):
    """The loss whose curvature is taken, and how far a pruned model is from its parent."""

    name: str
    needs_dense = False  # whether a quality is one beside the dense model, whatever the labels
    uses_labels = True  # whether labels of classes say how good outputs are, and can be trained on
    uses_gradient = True  # whether the kind of `loss` makes a difference

    @abstractmethod
    def loss(self, gradient: str, seed: int) -> Loss:
        """The loss of the kind `gradient`; what it draws depends on the seed."""

    @abstractmethod
    def outputs(self, model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the model, computing in `dtype`, says of all images, as `divergence` compares it; on the CPU."""

    @abstractmethod
    def divergence(self, outputs: Tensor, reference: Tensor) -> float:
        """How far outputs are from those of the dense model; 0 where they are equal."""

    @abstractmethod
    def distillation(self, outputs: Tensor, taught: Tensor) -> Tensor:
        """The loss of following a teacher that gives `taught` for the same images: a scalar, averaged over images."""

    @abstractmethod
    def score(self) -> Score:
        """Of a model that is evaluated."""


def outputs_of(model: nn.Module, batches: Batches, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The outputs of all images, of those of all processes, in float32 on the CPU."""
    model.eval().to(device)  # before inference mode, whose tensors no backward pass could use
    with torch.inference_mode(), autocast(device, dtype):
        outputs = [model(images.to(device, non_blocking=True)).float().cpu() for images, _ in batches]
    return torch.cat(distributed.all_gather(outputs))
