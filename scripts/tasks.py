"""Trained models with their images, for the benchmarks of pruning and recovery; and their recovery."""

import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.data.batches import Batch, Batches
from lpvit_cli.data.readers import DigitsReader
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.tensors import write_tensors
from lpvit_cli.pruning.plan import Plan, build_plan
from lpvit_cli.recipe import Recipe
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import PruneSection
from lpvit_cli.recovery.history import read_losses
from lpvit_cli.recovery.lora import adapt, merge
from lpvit_cli.recovery.objective import Objective
from lpvit_cli.recovery.start import choose_trained, start_from_gradient
from lpvit_cli.recovery.trainer import Trainer
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.tasks.classification import Classification
from lpvit_cli.tasks.quality import ClassificationQuality

CPU = torch.device("cpu")
SWIN = ModelSection(
    name="swin_tiny_patch4_window7_224",
    kwargs={"img_size": (32, 64), "window_size": 4, "embed_dim": 64, "depths": (2, 4), "num_heads": (2, 4), "num_classes": 10},
)


def plan_of(
    model: nn.Module,
    statistics: dict[str, LayerStatistics],
    calibration: list[Batch],
    gradient: str,
    seed: int,
    **prune: object,
) -> Plan:
    """The plan of a trained model on the CPU; `prune`: what differs from a recipe's defaults."""
    settings = PruneSection.model_validate(prune)
    layers = prunable_layers(model, settings.layers)
    facts = {"task": Classification(), "gradient": gradient, "seed": seed, "device": CPU, "progress": lambda *_: None}
    return build_plan(settings, model, layers, statistics, calibration, example=calibration[0][0][:1], **facts)  # type: ignore[arg-type]


@dataclass
class Task:
    """A trained model and its images."""

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    val: list[Batch]

    def calibration(self, seed: int, images: int = 512) -> list[Batch]:
        chosen = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))[:images]
        return split(self.train[0][chosen], self.train[1][chosen])

    def top1(self, model: nn.Module) -> float:
        score = Classification().score()
        with torch.inference_mode():
            for images, labels in self.val:
                score.add(model.eval()(images), None, labels)
        return score.quality().top1


def split(images: Tensor, labels: Tensor, size: int = 64) -> list[Batch]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def digits(which: str, width: int) -> tuple[Tensor, Tensor]:
    """Digits as normalised images [n, 3, 32, width]; on a canvas wider than 32 each at a random place."""
    reader = DigitsReader(which)
    images = F.interpolate(torch.from_numpy(reader.images)[:, None].float() / 255, (32, 32), mode="bilinear", antialias=True)
    places = torch.randint(0, width - 31, (len(images),), generator=torch.Generator().manual_seed(len(images))).tolist()
    canvas = torch.stack([F.pad(image, (x, width - 32 - x, 0, 0)) for image, x in zip(images, places, strict=True)])
    return (canvas.expand(-1, 3, -1, -1) - 0.5) / 0.5, torch.from_numpy(reader.labels).long()


def vit_task() -> Task:
    model = build_model(Recipe.load("digits_vit").model)
    return Task("digits_vit", model, digits("train", 32), split(*digits("validation", 32)))


def swin_task(cache: Path, epochs: int = 40) -> Task:
    torch.manual_seed(0)
    model: nn.Module = build_model(SWIN)
    train, val = digits("train", 64), split(*digits("validation", 64))
    if cache.is_file():
        model = build_model(SWIN.model_copy(update={"weights": cache}))
        return Task("digits_swin", model, train, val)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(train[0]) // 64 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train[0]))
        for images, labels in split(train[0][order], train[1][order]):
            images = torch.roll(images, int(torch.randint(-16, 17, ())), dims=3)
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(cache, {name: tensor.contiguous() for name, tensor in model.eval().state_dict().items()})
    return Task("digits_swin", model, train, val)


class TensorBatches(Batches):
    """Of images that are tensors already."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self.source  # type: ignore[misc]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(100 * self.seed + number))
        yield from split(images[order], labels[order], self.batch_size)[start:]

    def __len__(self) -> int:
        return -(-len(self.source[0]) // self.batch_size)  # type: ignore[index]


def recover(task: Task, model: nn.Module, seed: int, settings: FinetuneSection) -> tuple[list[float], list[float]]:
    """Recover a pruned model in place, distilled from the dense one; the training loss of every step, top-1 after every epoch.

    The model ends as the best of its epochs; the last entry tells what the last one was.
    """
    torch.manual_seed(seed)
    train = TensorBatches(task.train, None, 64, 10, seed=seed)  # type: ignore[arg-type]
    objective = Objective(settings, 10, task.model.eval())
    ranks = dict.fromkeys(sparse_layers(model), settings.rank) if isinstance(settings.rank, int) else settings.rank
    if settings.method == "lora_ga":
        start_from_gradient(model, ranks, settings, train, objective, nullcontext, CPU, lambda *_: None)  # type: ignore[arg-type]
    elif settings.method == "lora":
        adapt(model, ranks, settings.alpha)
    choose_trained(model, settings)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,  # type: ignore[arg-type]
            settings,
            train,
            objective,
            lambda: ClassificationQuality(0, task.top1(model), 100.0),
            ClassificationQuality(0, 0.0, 0.0),
            Path(folder),
            seed,
            CPU,
        )
        trainer.fit(lambda *_: None)
        losses = read_losses(trainer.log.path)
    merge(model)
    return losses, [epoch.validation for epoch in trainer.history]
