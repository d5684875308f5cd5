"""Running an exported file in onnxruntime as if it were a torch model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, require
from lpvit_cli.export.onnx import METADATA_KEY
from lpvit_cli.models import VisionModel


class OnnxModel(VisionModel):
    """`model(images [n, 3, H, W]) -> logits [n, classes]` on the CPU, preprocessing in `pretrained_cfg` as in timm.

    Raises EnvironmentFault when onnxruntime is missing or cannot read the file, or when lpvit did not write it.
    """

    def __init__(self, path: Path):
        super().__init__()
        require("onnxruntime")
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            config: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA_KEY])
        except KeyError as error:
            raise EnvironmentFault(
                f"{path}: was not exported by lpvit (no preprocessing in its metadata)", "use `lpvit export`"
            ) from error
        except Exception as error:  # onnxruntime raises one class per failure, all private
            reason = str(error).strip().splitlines()[0]
            raise EnvironmentFault(f"{path}: onnxruntime cannot load it: {reason}", "export it again") from error
        self.config = config
        self.num_classes = config["num_classes"]
        self.pretrained_cfg = config["preprocessing"]

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(logits)
