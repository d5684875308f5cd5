"""The recovery loop: AdamW or M-FAC, warm-up and cosine, cross-entropy with optional soft distillation, resumable by epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature.mfac import MFAC
from lpvit_cli.models import write_tensors
from lpvit_cli.recipe import Distill, FinetuneSection
from lpvit_cli.report.schema import Epoch

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # images, labels -> loss, logits


def distilled_loss(
    model: nn.Module, teacher: nn.Module | None, distill: Distill | None, label_smoothing: float, device: torch.device
) -> Loss:
    """(1 - w) cross-entropy + w T^2 KL(teacher || student), both at temperature T (Hinton et al., arXiv 1503.02531)."""

    def loss_of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        if teacher is not None and distill is not None:
            with torch.no_grad():
                target = F.log_softmax(teacher(images).float() / distill.temperature, dim=1)
            student = F.log_softmax(logits.float() / distill.temperature, dim=1)
            divergence = F.kl_div(student, target, log_target=True, reduction="batchmean")
            loss = (1 - distill.weight) * loss + distill.weight * distill.temperature**2 * divergence
        return loss, logits

    return loss_of


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor in (0, 1]: linear warm-up over `warmup` steps, then half a cosine to zero at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, steps - warmup)))


def optimizer_of(parameters: list[nn.Parameter], settings: FinetuneSection) -> torch.optim.Optimizer:
    if settings.optimizer == "mfac":
        return MFAC(parameters, settings.lr, settings.mfac.window, settings.mfac.damping, settings.weight_decay)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


class Trainer:
    """Trains the parameters of `model` that require a gradient; its state after each epoch is kept in `checkpoint`."""

    def __init__(self, model: nn.Module, settings: FinetuneSection, steps_per_epoch: int, checkpoint: Path, seed: int):
        self.model, self.settings, self.seed = model, settings, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.parameters, settings)
        self.steps_per_epoch = steps_per_epoch
        self.checkpoint = checkpoint
        self.history: list[Epoch] = []

    def resume(self) -> int:
        """Continue from the last complete epoch, if there is one; returns how many are done."""
        if not self.checkpoint.is_file():
            return 0
        tensors = load_file(self.checkpoint)
        with safe_open(self.checkpoint, "pt") as file:
            metadata = file.metadata()
        self.history = [Epoch.model_validate(epoch) for epoch in json.loads(metadata["history"])]
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        return len(self.history)

    def save(self) -> None:
        """Whole or not at all: a kill while writing leaves the previous epoch's state."""
        tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value.cpu().contiguous() for name, value in state.items()}
        self.checkpoint.parent.mkdir(exist_ok=True)
        beside = self.checkpoint.with_suffix(".tmp")
        write_tensors(beside, tensors, {"history": json.dumps([epoch.model_dump() for epoch in self.history])})
        beside.replace(self.checkpoint)

    def epoch(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss_of: Loss,
        precision: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler,
        on_step: Callable[[int, float, float, float], None],
    ) -> None:
        """One pass; `on_step` is told step in the epoch, mean loss, mean accuracy in %, images/s."""
        number = len(self.history)
        torch.manual_seed(self.seed + 1 + number)
        self.model.train()
        started, images, total_loss, hits = time.monotonic(), 0, 0.0, 0
        for step, (x, labels) in enumerate(batches, start=1):
            done = number * self.steps_per_epoch + step - 1
            factor = learning_rate(
                done, self.settings.epochs * self.steps_per_epoch, self.settings.warmup_epochs * self.steps_per_epoch
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * factor
            with precision():
                loss, logits = loss_of(x, labels)
            self.optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            scaler.step(self.optimizer)
            scaler.update()
            images += len(x)
            total_loss += loss.item() * len(x)
            hits += int((logits.argmax(dim=1).cpu() == labels).sum())
            rate = images / (time.monotonic() - started)
            on_step(step, total_loss / images, 100 * hits / images, rate)
        self.history.append(Epoch(epoch=number + 1, loss=total_loss / images, top1=100 * hits / images, images_per_second=rate))
