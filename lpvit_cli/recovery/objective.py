"""What recovery minimises: cross-entropy of (mixed) labels, and what a teacher says of the same images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.recipe.finetune import Augment, Distill, FinetuneSection
from lpvit_cli.tasks.base import Task
from lpvit_cli.tasks.classification import soft_distillation

Forward = Callable[[Tensor], Tensor]  # images [n, 3, H, W] -> logits [n, classes]


class Objective:
    """(1 - w) cross-entropy + w distillation; mixup and cutmix as the recipe says."""

    labelled = True

    def __init__(self, settings: FinetuneSection, num_classes: int, teacher: Forward | None):
        self.settings, self.num_classes, self.teacher = settings, num_classes, teacher
        self.mixup = _mixup(settings.augment, num_classes)

    def __call__(self, forward: Forward, images: Tensor, labels: Tensor, mix: bool = True) -> tuple[Tensor, Tensor]:
        """Mean loss over the images, and their logits; `labels` [n] int64. `mix`: with mixup and cutmix."""
        targets = labels
        if mix and self.mixup:
            images, targets = mixed(self.mixup, images, labels, self.num_classes)
        logits = forward(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.settings.label_smoothing)
        distill = self.settings.distill
        if self.teacher is not None and distill is not None:
            with torch.no_grad():
                said = self.teacher(images)
            loss = (1 - distill.weight) * loss + distill.weight * distillation(logits, said, distill)
        return loss, logits

    def hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many images [n, classes] get their label: what training tells of itself."""
        return (logits.argmax(dim=1) == labels).sum()


class Following:
    """Distillation alone: what a teacher says of the same images. It needs no labels."""

    labelled = False

    def __init__(self, teacher: Forward, loss: Callable[[Tensor, Tensor], Tensor]):
        self.teacher, self.loss = teacher, loss  # loss(outputs, taught): a scalar, averaged over images

    def __call__(self, forward: Forward, images: Tensor, labels: Tensor, mix: bool = True) -> tuple[Tensor, Tensor]:
        outputs = forward(images)
        with torch.no_grad():
            taught = self.teacher(images)
        return self.loss(outputs, taught), outputs

    def hits(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=outputs.device)


def objective_of(
    settings: FinetuneSection, task: Task, num_classes: int, teacher: Forward | None, labelled: bool
) -> Objective | Following:
    """What a recovery minimises: with labels of classes both they and the teacher, else the teacher alone.

    Raises UsageError where there is neither, and for settings that mean nothing without labels.
    """
    if labelled and task.uses_labels:
        return Objective(settings, num_classes, teacher)
    augment, distill = settings.augment, settings.distill
    needing = {
        "finetune.target_top1": settings.target_top1,
        "finetune.label_smoothing": settings.label_smoothing,
        "finetune.augment.mixup": augment and augment.mixup,
        "finetune.augment.cutmix": augment and augment.cutmix,
    }
    why = "this task has no use for labels" if labelled else "these images have no labels"
    if unfit := next((key for key, value in needing.items() if value), None):
        raise UsageError(
            f"{unfit}: means labels of classes, and {why}",
            f"leave it out: --set {unfit}={'null' if unfit == 'finetune.target_top1' else 0}",
        )
    if teacher is None or distill is None:
        raise UsageError(
            f"finetune.distill: {why}: recovery needs a teacher", "--set finetune.distill={}, or --set finetune=null"
        )
    if task.uses_labels:
        return Following(teacher, partial(distillation, distill=distill))
    return Following(teacher, task.distillation)


def distillation(logits: Tensor, said: Tensor, distill: Distill) -> Tensor:
    """T^2 KL(teacher || student), both at temperature T (arXiv 1503.02531), or cross-entropy with the teacher's class (arXiv
    2012.12877); both [n, classes], averaged over n."""
    if distill.kind == "hard":
        return F.cross_entropy(logits, said.argmax(dim=1))
    return soft_distillation(logits, said, distill.temperature)


def mixed(mixup: Mixup, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mixed images and their targets [n, classes]. timm mixes an even number of images: an odd one stays as it is."""
    even = len(images) // 2 * 2
    targets = F.one_hot(labels, num_classes).float()
    images = images.clone()
    if even:
        images[:even], targets[:even] = mixup(images[:even], labels[:even])
    return images, targets


def _mixup(augment: Augment | None, num_classes: int) -> Mixup | None:
    if augment is None or not (augment.mixup or augment.cutmix):
        return None
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=0.0, num_classes=num_classes)


class Teacher(nn.Module):
    """Another model on the student's images: normalised and scaled as it wants them. Its weights are frozen."""

    mean: Tensor
    std: Tensor
    their_mean: Tensor
    their_std: Tensor

    def __init__(self, model: VisionModel, student: VisionModel):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        ours, theirs = student.pretrained_cfg, model.pretrained_cfg
        self.size = tuple(theirs["input_size"][1:])
        statistics = [torch.tensor(cfg[key])[:, None, None] for cfg in (ours, theirs) for key in ("mean", "std")]
        for name, tensor in zip(("mean", "std", "their_mean", "their_std"), statistics, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.as_ours = torch.equal(self.mean, self.their_mean) and torch.equal(self.std, self.their_std)

    def forward(self, images: Tensor) -> Tensor:
        if not self.as_ours:
            images = (images * self.std + self.mean - self.their_mean) / self.their_std
        if images.shape[2:] != self.size:
            with torch.autocast(images.device.type, enabled=False):
                images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits: Tensor = self.model(images)
        return logits


def teacher_of(distill: Distill | None, parent: VisionModel, model: VisionModel, device: torch.device) -> Teacher | None:
    """The teacher of distillation, where there is one: the dense parent, unless the settings name another model.

    Raises UsageError for one whose outputs are of another kind or size than the model's.
    """
    if distill is None:
        return None
    kind = ("features", "tokens" if model.gives == "tokens" else "pooled") if not model.num_classes else ("classification",)
    teacher = Teacher(build_model(distill.teacher, *kind) if distill.teacher else parent, model)
    with torch.no_grad():
        theirs, ours = (one.cpu()(torch.zeros(1, *model.pretrained_cfg["input_size"])).shape[1:] for one in (teacher, model))
    model.to(device)
    if theirs != ours:
        what = "classes" if model.num_classes else "features"
        raise UsageError(
            f"finetune.distill.teacher: gives {' x '.join(map(str, theirs))} {what}, the model {' x '.join(map(str, ours))}",
            "take a teacher of the same classes or features, or --set finetune.distill=null",
        )
    return teacher.to(device)


def first_nonfinite(model: nn.Module, images: Tensor) -> str | None:
    """The first module, in the order they are called, whose output is not finite; None: all are."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
