"""Recovery on kept blocks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from lpvit_cli.recipe.data import Fraction
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.section import Section


class Augment(Section):
    """timm's training augmentation. `mixup` and `cutmix` are the alpha of their Beta distribution, `erasing` and `flip`
    probabilities; 0: not at all."""

    rand_augment: str | None = "rand-m9-mstd0.5-mmax9-inc1"  # at 10, posterize would be to 0 bits: refused by Pillow
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    erasing: Fraction = 0.0
    flip: Fraction = 0.5


class Distill(Section):
    """Distillation: (1 - weight) * cross-entropy + weight * T^2 * KL from the teacher (`soft`), or cross-entropy with the class
    the teacher decides for (`hard`, as in DeiT, without its token). `teacher`: any timm model of the same classes; None: the
    dense parent."""

    kind: Literal["soft", "hard"] = "soft"  # what the teacher gives
    weight: Fraction = 0.5  # of the teacher
    temperature: float = Field(default=2.0, gt=0)  # T
    teacher: ModelSection | None = None


class Mfac(Section):
    """SGD preconditioned by the inverse Fisher of the latest `window` gradients plus `damping` (M-FAC, arXiv 2107.03356). Takes
    window x trained parameters x 4 bytes, in the checkpoint too. The default window goes with the default finetune.lr; steps
    grow with the window, so halve one when you double the other."""

    window: PositiveInt = 128
    damping: float = Field(default=1e-4, gt=0)


class FinetuneSection(Section):
    """Recovery on kept blocks. `lora_ga` starts low-rank adapters from the gradient, `lora` at random, `full` trains all kept
    weights. `alpha`, `gamma`: the scales of the paper. Validated after every epoch, the best model is kept, the pruned one if
    none is better."""

    method: Literal["lora_ga", "lora", "full"] = "lora_ga"  # what is trained
    epochs: PositiveInt = 10  # at most
    rank: PositiveInt | Annotated[dict[str, PositiveInt], Field(min_length=1)] = 16  # for all pruned layers, or by glob: the
    # first that matches a layer counts, a layer that none matches stays as it is
    alpha: float = Field(default=16.0, gt=0)
    gamma: float = Field(default=16.0, gt=0)
    init_batches: PositiveInt = 8  # with lora_ga: batches whose gradient starts the adapters
    also_train: tuple[Literal["norms", "biases", "head"], ...] = ("norms", "biases")  # beside the adapters
    optimizer: Literal["adamw", "mfac"] = "adamw"  # mfac: SGD preconditioned by M-FAC
    mfac: Mfac = Mfac()  # with optimizer: mfac
    lr: float | None = Field(default=None, gt=0)  # the highest learning rate; None: 3e-5 with full, else 1e-3
    weight_decay: float = Field(default=0.0, ge=0)  # with lora and full
    warmup_epochs: float = Field(default=1.0, ge=0)  # linear warm-up; a cosine follows
    accumulate: PositiveInt = 1  # batches of data.batch_size images a step
    clip_norm: float = Field(default=1.0, gt=0)  # of the gradient
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of a moving average of what is trained, which is then kept
    label_smoothing: Fraction = 0.0  # of the given labels
    augment: Augment | None = None  # None: the preprocessing of evaluation
    distill: Distill | None = Distill()  # None: no teacher
    target_top1: float | None = Field(default=None, gt=0, le=100)  # stop as soon as the validation accuracy is that good

    @property
    def highest_lr(self) -> float:
        """Pretrained backbones bear no more than 3e-5 on all their weights; adapters start small."""
        return self.lr or (3e-5 if self.method == "full" else 1e-3)

    @model_validator(mode="after")
    def _decays_to_the_pruned_model(self) -> Self:
        if self.weight_decay and self.method == "lora_ga":
            raise ValueError(
                "weight_decay needs method: lora or full (LoRA-GA's factors start at full length: decay undoes it)"
            )
        return self
