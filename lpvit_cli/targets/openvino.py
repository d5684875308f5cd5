"""Running OpenVINO's files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, require
from lpvit_cli.files import reason
from lpvit_cli.targets.base import METADATA_KEY, ExportedModel


def compiled(path: Path, threads: int) -> Any:
    """Ready to run on the CPU in float32."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", settings)


def open_compiled(path: Path, threads: int, images: Tensor) -> Callable[[], object]:
    """The call that is timed."""
    return partial(compiled(path, threads), images.numpy())


class OpenVinoModel(ExportedModel):
    """`model(images [n, 3, H, W]) -> logits [n, classes]`, preprocessing in `pretrained_cfg` as in timm.

    Raises EnvironmentFault when openvino is missing, cannot read the file, or lpvit did not write it.
    """

    def __init__(self, path: Path, threads: int | None = None):
        super().__init__()
        require("openvino")
        try:
            self.compiled = compiled(path, threads or torch.get_num_threads())
            metadata = {METADATA_KEY: _rt_info(path)}
        except Exception as error:  # openvino raises RuntimeError and kinds of its own
            raise EnvironmentFault(f"{path}: openvino cannot load it: {reason(error)}", "export it again") from error
        self.adopt(path, metadata)

    def run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(images.numpy())[0].copy())


def _rt_info(path: Path) -> str:
    import openvino

    model = openvino.Core().read_model(path)
    return str(model.get_rt_info(METADATA_KEY).astype(str)) if model.has_rt_info(METADATA_KEY) else "{}"
