"""ONNX through torch's dynamo exporter, with everything a user of the file needs in its metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from lpvit_cli.models import VisionModel

METADATA_KEY = "lpvit"


def export_onnx(model: VisionModel, path: Path, opset: int, config: dict[str, Any]) -> None:
    """Write `model` (dense layers only, float32) to `path`: input `images` [batch, 3, H, W] normalised, output `logits`.

    The batch is dynamic. `config` (a model folder's config.json) goes into the metadata, so the file stands alone.
    """
    import onnx

    example = torch.randn(2, *model.pretrained_cfg["input_size"])
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    graph = onnx.load(str(path), load_external_data=False)
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(config)})
    onnx.save(graph, str(path))
    onnx.checker.check_model(str(path))


@contextlib.contextmanager
def _quiet(*names: str):  # type: ignore[no-untyped-def]
    """The exporter narrates its passes through logging; a user needs none of it."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
