"""Running an ONNX file in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, require
from lpvit_cli.files import reason
from lpvit_cli.targets.base import ExportedModel


def session(model: Path | bytes, threads: int | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU. Threads: None leaves the number to onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or 0
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], enable_fallback=0)


class OnnxModel(ExportedModel):
    """`model(images [n, 3, H, W]) -> logits [n, classes]` on the CPU, preprocessing in `pretrained_cfg` as in timm.

    `config` is what lpvit wrote into the file. A file of another origin runs too if its metadata holds the preprocessing, as
    JSON under `lpvit` (in `preprocessing`) or `pretrained_cfg`.

    Raises EnvironmentFault when onnxruntime is missing or cannot read the file, or when the metadata do not suffice.
    """

    def __init__(self, path: Path, threads: int | None = None):
        super().__init__()
        require("onnxruntime")
        try:
            self.session = session(path, threads)
            metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime raises one class per failure, all private
            raise EnvironmentFault(f"{path}: onnxruntime cannot load it: {reason(error)}", "export it again") from error
        self.input, self.output = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.adopt(path, metadata, (self.output.shape or [None])[-1])
        if len(self.input.shape) != 4 or isinstance(self.input.shape[0], int):
            raise EnvironmentFault(
                f"{path}: takes {self.input.shape}, not any number of images [batch, 3, H, W]", "export it with a dynamic batch"
            )
        expected, given = tuple(self.pretrained_cfg["input_size"]), tuple(self.input.shape[1:])
        if any(isinstance(side, int) and side != other for side, other in zip(given, expected, strict=True)):
            raise EnvironmentFault(
                f"{path}: takes images of {list(given)}, its metadata say {list(expected)}",
                "correct the metadata, or export it again",
            )

    def run(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run([self.output.name], {self.input.name: images.numpy()})
        return torch.from_numpy(logits)
