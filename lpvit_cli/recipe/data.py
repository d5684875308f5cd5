"""Images, and what calibration does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from lpvit_cli.recipe.section import Section, beside_the_recipe

Fraction = Annotated[float, Field(ge=0, le=1)]
ClassName = Annotated[str, Field(coerce_numbers_to_str=True)]


class Columns(Section):
    """Columns of a `hfds/NAME` data set. By default those whose types are an image and classes."""

    image: str | None = None  # the column of images
    label: str | None = None  # the column of classes, as whole numbers


class DataSection(Section):
    """Images: `digits` and `synthetic` are built in, `folder` and `tar` need root, `hfds/NAME` and `wds/NAME` come from the
    libraries datasets and webdataset. [Data](data.md) says how folders become splits and classes, and pixels numbers."""

    dataset: str  # where images come from
    root: Path | None = None  # the folder, tar file or download folder of the images
    train_split: str = "train"  # calibration and recovery
    val_split: str = "validation"  # accuracies
    val_images: PositiveInt | None = None  # so many, a fixed random choice; None: all of them
    labels: Literal["auto", "none"] = "auto"  # none: class folders and labels mean nothing
    class_map: Path | tuple[ClassName, ...] | None = None  # the classes of a folder or tar in label order: their names, or a
    # .json or .txt file of them; None: the natural order
    columns: Columns = Columns()  # of a Hugging Face data set
    exif: bool = False  # turn photographs as their EXIF orientation says; timm and torchvision do not
    batch_size: PositiveInt = 64  # of recovery and evaluation; of all processes together
    workers: int = Field(default=4, ge=0)  # processes that decode images
    max_corrupt: Fraction = 0.01  # unreadable images are skipped and counted; more than this fraction is an error

    def remembered(self) -> dict[str, Any]:
        """What a model folder keeps, for those who evaluate it: where its validation images are, and how they are read."""
        place = {"dataset": self.dataset, "root": str(self.root or ""), "split": self.val_split}
        return place | {"labels": self.labels, "exif": self.exif}

    @field_validator("root", "class_map")
    @classmethod
    def _beside_the_recipe(cls, path: Any, info: ValidationInfo) -> Any:
        return path if isinstance(path, tuple) else beside_the_recipe(path, info)


class CalibrateSection(Section):
    """Statistics of the dense model. `gradient` is the loss they are taken of, for classification: `sampled` draws labels from
    the model (the true Fisher), `logits` takes mean(logits^2) (LPViT), `empirical` uses the given labels, of which images that
    the model has learnt by heart have no gradient left. Features have one loss: the true Fisher of a Gaussian likelihood."""

    images: PositiveInt = 2048  # of the training split
    batch_size: PositiveInt = 16  # changes memory and speed, not the statistics but for rounding
    gradient: Literal["sampled", "empirical", "logits"] = "sampled"
