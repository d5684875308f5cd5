"""A file that runs without torch's modules, as if it were a torch model."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import parse_json, reason
from lpvit_cli.models.config_file import Described, require_valid
from lpvit_cli.models.families.wrapper import DIMENSIONS
from lpvit_cli.models.protocol import VisionModel

METADATA_KEY = "lpvit"
NEEDED = ("input_size", "mean", "std", "interpolation", "crop_pct")


class ExportedModel(VisionModel):
    """A file that runs on the CPU in float32; `config` is what lpvit wrote into it."""

    config: dict[str, Any]
    path: Path

    def adopt(self, path: Path, metadata: dict[str, str], classes: object = None) -> None:
        """Take over what the file's metadata say; `classes`: how many its output has, if it tells. Raises EnvironmentFault."""
        self.path = path
        self.config = read_metadata(path, metadata, classes)
        self.pretrained_cfg = self.config["preprocessing"]
        self.num_classes, self.gives = self.config["num_classes"], self.config["gives"]

    @abstractmethod
    def run(self, images: Tensor) -> Tensor:
        """The output for float32 images on the CPU; may raise whatever the runtime does."""

    def forward(self, images: Tensor) -> Tensor:
        try:
            output = self.run(images.float().cpu().contiguous())
        except Exception as error:  # runtimes raise many kinds
            raise EnvironmentFault(f"{self.path}: cannot be run: {reason(error)}", "export it again") from error
        classes = self.num_classes if self.gives == "logits" else output.shape[-1:].numel()
        if output.ndim != DIMENSIONS[self.gives] or (len(output), output.shape[-1]) != (len(images), classes):
            raise EnvironmentFault(
                f"{self.path}: gives {list(output.shape)} for {len(images)} images, its metadata say {self.gives} of "
                f"{self.num_classes} classes",
                "export it again",
            )
        return output


def read_metadata(path: Path, metadata: dict[str, str], classes: object) -> dict[str, Any]:
    """What is known of the model in a file; `preprocessing` is complete, `num_classes` a number."""
    try:
        config: dict[str, Any] = parse_json(metadata.get(METADATA_KEY, "{}"))
        config.setdefault("preprocessing", parse_json(metadata.get("pretrained_cfg", "{}")))
        config["num_classes"] = classes if config.get("num_classes") is None else config["num_classes"]
        config["gives"] = config.get("gives") or ("logits" if config["num_classes"] else "pooled")
        missing = [key for key in NEEDED if key not in config["preprocessing"]]
        missing += [] if isinstance(config["num_classes"], int) else ["num_classes"]
        if not missing:
            require_valid(Described, config)
    except (ValueError, TypeError, AttributeError) as error:
        raise EnvironmentFault(
            f"{path}: its metadata are unreadable: {reason(error)}", "export it again with `lpvit export`"
        ) from error
    if missing:
        raise EnvironmentFault(
            f"{path}: its metadata do not say how to use it: no {', '.join(missing)}",
            "use `lpvit export`, or add preprocessing as JSON under the metadata key pretrained_cfg (timm's names)",
        )
    return config
