"""The recovery loop: AdamW or M-FAC, warm-up and cosine, clipping, a moving average, the best epoch; resumable at any step.

Random numbers depend on seed and step only (randomness.py), so that a resumed recovery ends where an uninterrupted one does:
bit for bit where the device computes the same twice, as CPUs do. With several processes every one holds the same state:
gradients, losses and accuracies are those of all together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpvit_cli import distributed
from lpvit_cli.curvature.mfac import MFAC
from lpvit_cli.data.batches import Batch, Batches
from lpvit_cli.errors import CheckFailed, EnvironmentFault
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.randomness import seed_all
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery import checkpoint
from lpvit_cli.recovery.history import Epoch, History
from lpvit_cli.recovery.objective import Following, Forward, Objective, first_nonfinite
from lpvit_cli.tasks.quality import Quality

CHECKPOINT_SECONDS = 300.0  # so much work a kill may cost


class Judged(Protocol):
    """How good a model is: `score` compares, more is better, its first number in the task's points."""

    @property
    def score(self) -> tuple[float, ...]: ...


Evaluate = Callable[[], Judged]
OnStep = Callable[[int, int, str], None]  # steps of this epoch done and in all, detail


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor in (0, 1]: linear warm-up over `warmup` steps (not always whole), then half a cosine from 1 to 0 at `steps`."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    start = math.ceil(warmup)  # the first step that does not warm up
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def optimizer_of(parameters: list[nn.Parameter], settings: FinetuneSection) -> torch.optim.Optimizer:
    """Norms and biases do not decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if settings.optimizer == "mfac":
        return MFAC(groups, settings.highest_lr, settings.mfac.window, settings.mfac.damping)
    return torch.optim.AdamW(groups, lr=settings.highest_lr)


@dataclass
class Sums:
    """Of the epoch so far, over all processes."""

    steps: int = 0
    images: int = 0
    loss: float = 0.0
    hits: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains the parameters of `model` that require a gradient, and keeps those of the best validation quality.

    Training moves buffers too, such as the statistics of BatchNorm: they are kept and restored with the parameters. The moving
    average takes floating-point buffers like parameters, so that statistics go with the weights they belong to, and the model's
    own integers. With several processes an epoch ends with the buffers of the main process in all.

    The model as it is given counts as epoch 0. Everything needed to go on is in `folder`, if there is one:
    checkpoint.safetensors and history.jsonl, a line for every step and every epoch.
    """

    def __init__(
        self,
        model: VisionModel,
        settings: FinetuneSection,
        train: Batches,
        objective: Objective | Following,
        evaluate: Evaluate,
        before: Judged,
        folder: Path | None,
        seed: int,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.model, self.settings, self.train, self.objective, self.evaluate = model, settings, train, objective, evaluate
        self.folder, self.seed, self.device, self.precision = folder, seed, device, precision
        self.scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.forward: Forward = model
        if distributed.world() > 1:  # from now on, all have the parameters of the main process
            devices = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(model, devices, broadcast_buffers=False)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer_of(list(self.trained.values()), settings)
        written = model.state_dict().keys()
        self.buffers = {name: b for name, b in model.named_buffers() if name in written}
        self.moving: dict[str, Tensor] = {**self.trained, **self.buffers}  # all that training may change
        averaged = {name for name in self.moving if name in self.trained or _has_mean(self.buffers[name])}
        self.average = _copies({name: self.moving[name] for name in averaged}) if settings.ema else {}
        self.best = _copies(self.moving)
        self.best_epoch, self.best_quality = 0, before
        self.history: list[Epoch] = []
        self.log = History(folder / "history.jsonl" if folder else None)
        self.sums = Sums()
        self.steps_per_epoch = -(-len(train) // settings.accumulate)

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer remembers."""
        return sum(t.numel() * t.element_size() for t in checkpoint.optimizer_tensors(self.optimizer).values())

    # the loop

    def fit(self, on_step: OnStep) -> None:
        """Train the epochs that are left, or until the validation accuracy is `target_top1`; end with the best of them."""
        while not self.finished:
            self._epoch(on_step)
            self._end_of_epoch()
        self._put(self.best)

    @property
    def finished(self) -> bool:
        return len(self.history) >= self.settings.epochs or self.target_reached

    @property
    def target_reached(self) -> bool:
        return self.best_quality.score[0] >= (self.settings.target_top1 or math.inf)

    def notes(self, resumed: int) -> list[str]:
        """What a user should know of it; `resumed`: the step after which it went on."""
        notes = [f"resumed after step {resumed}"] if resumed else []
        if self.target_reached and len(self.history) < self.settings.epochs:
            notes.append(f"stopped after epoch {len(self.history)}: finetune.target_top1 is reached")
        if self.best_epoch == 0 and self.history:
            notes.append("no epoch was better than the pruned model, which is kept: lower finetune.lr, or train longer")
        return notes

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.history) * self.steps_per_epoch + self.sums.steps

    def _epoch(self, on_step: OnStep) -> None:
        self.model.train()
        number, saved, began = len(self.history), time.monotonic(), time.monotonic() - self.sums.seconds
        for batches in _grouped(self.train.epoch(number, self.sums.steps * self.settings.accumulate), self.settings.accumulate):
            lr = self._step(batches)
            self.sums.seconds = time.monotonic() - began
            mean, rate = self.sums.loss / max(1, self.sums.images), self.sums.images / self.sums.seconds
            top1 = f"  accuracy {100 * self.sums.hits / max(1, self.sums.images):.1f} %" if self.objective.labelled else ""
            detail = f"epoch {number + 1}/{self.settings.epochs}  loss {mean:.3f}{top1}  {rate:.0f} images/s"
            if self.sums.steps < self.steps_per_epoch and time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
            on_step(self.sums.steps, self.steps_per_epoch, f"{detail}  lr {lr:.1e}")

    def _step(self, batches: list[Batch]) -> float:
        """One step of the optimizer on some batches, each weighing as much as it has images; returns the learning rate."""
        settings, step = self.settings, self.done
        seed_all(self.seed, 1, step, distributed.rank())
        steps = settings.epochs * self.steps_per_epoch
        lr = settings.highest_lr * learning_rate(step, steps, settings.warmup_epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        usual, images, total = self.train.batch_size * len(batches), 0, 0.0
        for position, (x, labels) in enumerate(batches, start=1):
            loss, hits, count = self._backward(x, labels, usual, wait=position < len(batches))
            images, total = images + count, total + loss
            self.sums.hits += hits
        if images:
            self._update(usual / images, step)
        self.sums.steps += 1
        self.sums.images += images
        self.sums.loss += total
        self.log.add(step=step + 1, epoch=len(self.history) + 1, loss=total / max(1, images), lr=lr)
        return lr

    def _backward(self, x: Tensor, labels: Tensor, usual: int, wait: bool) -> tuple[float, int, int]:
        """Add the gradient of the summed loss over `usual`; that sum, hits and images over all processes."""
        count = len(x)
        if not count:  # every process must take part: an image that counts for nothing
            x, labels = torch.zeros(1, *self.model.pretrained_cfg["input_size"]), torch.zeros(1, dtype=torch.int64)
        x, labels = x.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        with self.forward.no_sync() if wait and isinstance(self.forward, DistributedDataParallel) else nullcontext():
            with self.precision():
                loss, logits = self.objective(self.forward, x, labels)
            hits = self.objective.hits(logits, labels)
            sums = torch.stack([loss.detach().double() * count, hits.double() * (count > 0), hits.new_tensor(count).double()])
            distributed.all_reduce(sums)
            total, all_hits, images = sums.tolist()
            if not math.isfinite(total):
                self._diverged(f"the loss is {total}", x)
            weight = count * distributed.world() / usual  # the mean over processes is taken while summing
            self.scaler.scale(loss * weight if count else loss * 0).backward()
        return total, int(all_hits), int(images)

    def _update(self, factor: float, step: int) -> None:
        parameters = list(self.trained.values())
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        norm = nn.utils.get_total_norm(gradients)
        if not self.scaler.is_enabled() and not bool(norm.isfinite()):
            spoiled = (name for name, p in self.trained.items() if p.grad is not None and not bool(p.grad.isfinite().all()))
            self._diverged("gradients are not finite", None, next(spoiled, "their norm"))
        nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.settings.ema:
            decay = min(self.settings.ema, (1 + step) / (10 + step))  # soon forgets where it started
            now = [self.moving[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    def _diverged(self, what: str, x: Tensor | None, where: str | None = None) -> None:
        if x is not None:
            with self.precision():
                where = first_nonfinite(self.model, x)
        kept = f"; the state before is kept in {self.checkpoint}" if self.checkpoint and self.checkpoint.is_file() else ""
        when = f"step {self.done + 1} (epoch {len(self.history) + 1})"
        raise CheckFailed(
            f"recovery diverged: {what} in {when}, first in {where or 'the loss'}",
            f"lower finetune.lr, or use --dtype float32, with --no-resume (which starts anew){kept}",
        )

    def _end_of_epoch(self) -> None:
        distributed.share(*self.buffers.values(), *(self.average[name] for name in self.buffers if name in self.average))
        with self._averaged():
            quality = self.evaluate()
            if quality.score >= self.best_quality.score:
                self.best = _copies(self.moving)
                self.best_epoch, self.best_quality = len(self.history) + 1, quality
        sums = self.sums
        epoch = Epoch(
            epoch=len(self.history) + 1,
            loss=sums.loss / max(1, sums.images),
            top1=100 * sums.hits / max(1, sums.images) if self.objective.labelled else None,
            validation=quality.score[0],
            images_per_second=sums.images / sums.seconds,
        )
        self.log.add(**epoch.model_dump())
        self.history.append(epoch)
        self.sums = Sums()
        self.save()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the moving average in the place of what is trained, where there is one."""
        own = _copies({name: self.moving[name] for name in self.average})
        self._put(self.average)
        yield
        self._put(own)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.moving[name].copy_(tensor)

    # going on after a kill

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.safetensors" if self.folder else None

    def save(self) -> None:
        if self.checkpoint is None or not distributed.is_main():
            return
        groups = {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            "average": self.average,
            "best": self.best,
        }
        state = {
            "history": [epoch.model_dump() for epoch in self.history],
            "sums": asdict(self.sums),
            "best_epoch": self.best_epoch,
            "best_quality": TypeAdapter(Any).dump_python(self.best_quality),
            "scaler": self.scaler.state_dict(),
        }
        checkpoint.write(self.checkpoint, groups, state)

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; returns how many steps are done."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            self.log.cut(0, 0)
            return 0
        groups, state = checkpoint.read(self.checkpoint)
        self.model.load_state_dict(groups["model"])
        checkpoint.load_optimizer(self.optimizer, groups.get("optimizer", {}))
        for held, group in ((self.average, "average"), (self.best, "best")):
            if held.keys() != groups.get(group, {}).keys():
                raise EnvironmentFault(f"{self.checkpoint}: misses tensors of this model", "start anew with --no-resume")
            for name, tensor in held.items():
                tensor.copy_(groups[group][name])
        self.history = [Epoch.model_validate(epoch) for epoch in state["history"]]
        self.sums = Sums(**state["sums"])
        self.best_epoch = state["best_epoch"]
        self.best_quality = TypeAdapter(Quality).validate_python(state["best_quality"])
        self.scaler.load_state_dict(state["scaler"])
        self.log.cut(self.done, len(self.history))
        return self.done


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _has_mean(buffer: Tensor) -> bool:
    """Whether an average over steps is meant: of no indices and counts, and of no mask with infinities."""
    return buffer.is_floating_point() and bool(buffer.isfinite().all())


def _grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
