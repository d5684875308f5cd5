"""How good a model is at its task, in numbers: what reports hold, tables show and recovery compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


@dataclass(frozen=True)
class Figure:
    """One number of a quality, for a table."""

    name: str
    value: float
    percent: bool = True

    @property
    def text(self) -> str:
        return f"{self.value:.2f} %" if self.percent else f"{self.value:.4f}"

    def minus(self, dense: Figure) -> str:
        """How far it is from the dense model's: points of percentages."""
        return f"{self.value - dense.value:+.2f}" if self.percent else f"{self.value - dense.value:+.4f}"


@dataclass(frozen=True)
class Accuracy:
    """Percentages over `images` images; 0 images give 0 %."""

    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class ClassificationQuality:
    """Percentages: `top1`, `top5` of labelled images; `agreement`, images that get the dense model's class, and `kl`, the mean
    divergence in nats from its class probabilities, where it was there to compare with. None: not known."""

    images: int
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    kl: float | None = None
    task: Literal["classification"] = "classification"

    @property
    def figures(self) -> list[Figure]:
        """The numbers that are known, the one that counts first."""
        named = (("top-1", self.top1), ("top-5", self.top5), ("same class as dense", self.agreement))
        return [Figure(name, value) for name, value in named if value is not None]

    @property
    def score(self) -> tuple[float, ...]:
        """More is better; the first number is in points of the task's metric."""
        if self.top1 is not None and self.top5 is not None:
            return self.top1, self.top5
        return self.agreement or 0.0, -(self.kl or 0.0)

    @property
    def step(self) -> float:
        """The points of one image."""
        return 100 / max(1, self.images)

    @property
    def accuracy(self) -> Accuracy | None:
        return None if self.top1 is None or self.top5 is None else Accuracy(self.top1, self.top5, self.images)

    def told(self, dense: ClassificationQuality) -> str:
        if self.top1 is None:
            return f"the dense model's class for {self.agreement:.2f} % of the images"
        return f"top-1 {self.top1:.2f} % (dense {dense.top1:.2f} %)"


@dataclass(frozen=True)
class FeaturesQuality:
    """Embeddings against the dense model's: the mean `cosine` over images and that of the worst 5 % (`cosine_p5`: the 5th
    percentile), `relative_error` ||f - dense|| / ||dense||; None: there was nothing to compare with. `knn1`, `knn5`, `knn20`:
    k-NN top-1 in percent by cosine, among this model's own embeddings of training images; None: the images have no classes."""

    images: int
    cosine: float | None = None
    cosine_p5: float | None = None
    relative_error: float | None = None
    knn1: float | None = None
    knn5: float | None = None
    knn20: float | None = None
    task: Literal["features"] = "features"

    @property
    def figures(self) -> list[Figure]:
        """The numbers that are known, the one that counts first."""
        near = (
            ("cosine to dense", self.cosine),
            ("cosine, worst 5 %", self.cosine_p5),
            ("relative error", self.relative_error),
        )
        knn = (("1-NN top-1", self.knn1), ("5-NN top-1", self.knn5), ("20-NN top-1", self.knn20))
        figures = [Figure(name, value, percent=False) for name, value in near if value is not None]
        return figures + [Figure(name, value) for name, value in knn if value is not None]

    @property
    def score(self) -> tuple[float, ...]:
        """More is better; the first number is in points: hundredths of the mean cosine."""
        return 100 * (self.cosine or 0.0), -(self.relative_error or 0.0)

    step = 0.0  # an image can change a mean of cosines by any amount

    @property
    def accuracy(self) -> None:
        return None

    def told(self, dense: FeaturesQuality) -> str:
        near = f"embeddings at cosine {self.cosine:.4f} to the dense model's (worst 5 %: {self.cosine_p5:.4f})"
        return near if self.knn20 is None else f"{near}, 20-NN {self.knn20:.2f} % (dense {dense.knn20:.2f} %)"


Quality = Annotated[ClassificationQuality | FeaturesQuality, Field(discriminator="task")]
