"""ONNX: a dense graph from torch's dynamo exporter, and files with everything their user needs in the metadata."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.export.documents import output_name
from lpvit_cli.export.rewrite import SCOPES
from lpvit_cli.models.attention import unfused
from lpvit_cli.targets.base import METADATA_KEY

INLINE_BYTES = 2**30  # of weights; larger ones lie beside the graph, which protobuf ends at 2 GiB
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def dense_graph(model: nn.Module, opset: int, precision: str = "float32", example: Tensor | None = None) -> ir.Model:
    """`model` (dense layers only) as a graph: input `images` [batch, C, H, W] float32, output `output` float32.

    The batch is dynamic. `example`: an input; None: an image of the size in `model.pretrained_cfg`. With `precision` float16 or
    bfloat16 everything between input and output has that type. Raises UsageError when torch or onnx cannot write `opset`.
    """
    if precision == "bfloat16" and opset < 22:
        raise UsageError("export.opset: bfloat16 needs opset 22 or newer", "add --set export.opset=22")
    if opset > (newest := onnx.defs.onnx_opset_version()):
        raise UsageError(
            f"export.opset: {opset} is newer than the installed onnx knows ({newest})", "choose 20, or upgrade onnx"
        )
    output = output_name(model)
    inside: nn.Module = Cast(model, HALF[precision]) if precision in HALF else model
    cfg: Any = model.pretrained_cfg if example is None else None
    example = torch.randn(2, *(cfg["input_size"] if example is None else example.shape[1:]))
    try:
        program = _exported(inside.eval(), example, opset, output)
    except Exception as first:  # what torch cannot trace or translate ends in one of many kinds
        try:
            if (plain := unfused(inside)) is None:  # many cannot only because of their fused attention
                raise first
            program = _exported(plain.eval(), example, opset, output)
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:200]
            raise CheckFailed(
                f"export: torch {torch.__version__} cannot write this model as ONNX: {type(error).__name__}: {reason}",
                "try another torch, or --format torch",
            ) from error
    graph: ir.Model = program.model
    if graph.opset_imports[""] != opset:
        raise UsageError(f"export.opset: torch {torch.__version__} cannot write opset {opset}", "choose 20")
    return graph


def _exported(model: nn.Module, example: Tensor, opset: int, output: str) -> torch.onnx.ONNXProgram:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    return program


class Cast(nn.Module):
    """A model in a half-precision type behind a float32 input and output; in names, it is rewrite.INSIDE."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inside_a_cast, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inside_a_cast(images.to(self.dtype))
        return logits.float()


def as_float32(graph: ir.Model) -> None:
    """Turn, in place, half-precision types into float32, the rounded weights into float32 numbers: runs where they do not."""
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    for node in graph.graph:
        for name, attribute in node.attributes.items():
            if name == "to" and ir.DataType(attribute.as_int()) in halves:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        for value in node.outputs:
            if value.dtype in halves:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for value in graph.graph.initializers.values():
        if value.dtype in halves and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)


def save_onnx(graph: ir.Model, path: Path, metadata: dict[str, Any]) -> None:
    """Write and check a file. `metadata` holds preprocessing and all else in a model folder's config.json.

    Of what torch wrote about each node only its module is kept: stack traces tell paths of this machine.
    """
    for node in graph.graph:
        for key in set(node.metadata_props) - {SCOPES}:
            del node.metadata_props[key]
    graph.metadata_props[METADATA_KEY] = json.dumps(metadata)
    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if weights > INLINE_BYTES else None)
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
