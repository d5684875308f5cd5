"""A file that runs without torch's modules, as if it were a torch model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.models.protocol import VisionModel

METADATA_KEY = "lpvit"
NEEDED = ("input_size", "mean", "std", "interpolation", "crop_pct")


class ExportedModel(VisionModel):
    """A file that runs on the CPU in float32; `config` is what lpvit wrote into it."""

    config: dict[str, Any]

    def adopt(self, path: Path, metadata: dict[str, str], classes: object = None) -> None:
        """Take over what the file's metadata say; `classes`: how many its output has, if it tells. Raises EnvironmentFault."""
        self.config = read_metadata(path, metadata, classes)
        self.pretrained_cfg = self.config["preprocessing"]
        self.num_classes, self.gives = self.config["num_classes"], self.config["gives"]


def read_metadata(path: Path, metadata: dict[str, str], classes: object) -> dict[str, Any]:
    """What is known of the model in a file; `preprocessing` is complete, `num_classes` a number."""
    try:
        config: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
        config.setdefault("preprocessing", json.loads(metadata.get("pretrained_cfg", "{}")))
        config["num_classes"] = classes if config.get("num_classes") is None else config["num_classes"]
        config["gives"] = config.get("gives") or ("logits" if config["num_classes"] else "pooled")
        missing = [key for key in NEEDED if key not in config["preprocessing"]]
        missing += [] if isinstance(config["num_classes"], int) else ["num_classes"]
    except (ValueError, TypeError, AttributeError) as error:
        raise EnvironmentFault(
            f"{path}: its metadata are unreadable: {error}", "export it again with `lpvit export`"
        ) from error
    if missing:
        raise EnvironmentFault(
            f"{path}: its metadata do not say how to use it: no {', '.join(missing)}",
            "use `lpvit export`, or add preprocessing as JSON under the metadata key pretrained_cfg (timm's names)",
        )
    return config
