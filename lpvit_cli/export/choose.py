"""Which form each layer takes: the fastest in onnxruntime on this machine, by timing, dense included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from lpvit_cli.export.forms import FORMS, Builder, forms_of
from lpvit_cli.export.layer import ExportLayer, FormChoice, choose_by_kind
from lpvit_cli.measure.timing import Subject, time_in_visits
from lpvit_cli.progress import Progress
from lpvit_cli.targets.onnxruntime import session

VISITS, SAMPLES = 3, 4
OPSET = 20


def choose_forms(
    layers: Mapping[str, ExportLayer], tokens: Mapping[str, int], threads: int, progress: Progress
) -> dict[str, FormChoice]:
    """The choice for each layer on `tokens` rows of x. Layers of equal shape, block and density are timed once."""
    return choose_by_kind(layers, tokens, progress, lambda layer, rows: _choose(layer, rows, threads))


def _choose(layer: ExportLayer, tokens: int, threads: int) -> FormChoice:
    forms = forms_of(layer)
    if len(forms) == 1:
        return FormChoice(forms[0], {})
    x = np.random.default_rng(0).standard_normal((tokens, layer.weight.shape[1]), dtype=np.float32)

    def open_form(model: bytes) -> Subject:
        return partial(session(model, threads).run, None, {"x": x})

    opened: dict[str, Callable[[], Subject]] = {form: partial(open_form, single_layer(layer, form)) for form in forms}
    return FormChoice.fastest(time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=threads))


def single_layer(layer: ExportLayer, form: str) -> bytes:
    """A model of this layer alone: x [tokens, in] -> y [tokens, out]."""
    b = Builder(layer)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", layer.weight.shape[1]]))
    y = FORMS[form](b, x)
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["tokens", layer.weight.shape[0]])
    graph = ir.Graph(
        [x], [y], nodes=b.tape.nodes, initializers=b.tape.initializers, opset_imports={"": OPSET, "com.microsoft": 1}
    )
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
