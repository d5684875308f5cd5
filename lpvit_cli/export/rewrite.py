"""The linear layers of an exported dense graph, found and written anew as block-sparse ones."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience

from lpvit_cli.errors import CheckFailed
from lpvit_cli.export.forms import FORMS, MICROSOFT, Builder
from lpvit_cli.export.layer import ExportLayer

INSIDE = "inside_a_cast"  # what a module that wraps the model calls it; no module of a model has this name
SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter writes which module a node came from


@dataclass(frozen=True)
class Place:
    """A linear layer in the graph: its nodes, last the one that gives its output."""

    nodes: list[ir.Node]

    @property
    def x(self) -> ir.Value:
        found = self.nodes[0].inputs[0]
        assert found is not None
        return found

    @property
    def y(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def find_linears(model: ir.Model, names: Iterable[str]) -> dict[str, Place]:
    """Where the named nn.Linear modules are. Raises CheckFailed when one is not there exactly once."""
    products: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            products.setdefault(_module(node), []).append(node)
    found = {name: products.get(name, []) for name in names}
    if odd := [name for name, nodes in found.items() if len(nodes) != 1]:
        raise CheckFailed(
            f"export: {len(odd)} layers are not in the ONNX graph once each: {', '.join(odd[:3])}; "
            f"it has products of {', '.join(list(products)[:3])} ...",
            "leave them out of prune.layers; float32 with export.form=dense needs to find none",
        )
    return {name: Place([*nodes, *_bias_of(nodes[0])]) for name, nodes in found.items()}


def _bias_of(product: ir.Node) -> list[ir.Node]:
    """The Add of the same module, where the bias is not part of the product."""
    users = [use.node for use in product.outputs[0].uses()]
    return [user for user in users if user.op_type == "Add" and _module(user) == _module(product)]


def _module(node: ir.Node) -> str:
    """Name of the module that a node came from; "" where torch did not write it down."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[-2].removeprefix(f"{INSIDE}.") if len(scopes) > 1 else ""


def rewrite(model: ir.Model, layers: Mapping[str, ExportLayer], forms: Mapping[str, str]) -> None:
    """Write each layer in its form, in place."""
    for name, place in find_linears(model, layers).items():
        b = Builder(layers[name])
        x = place.x if _rank(place.x) == 2 else b.op("Reshape", place.x, b.numbers(-1, layers[name].weight.shape[1]))
        y = FORMS[forms[name]](b, x)
        new = y if _rank(place.y) == 2 else b.op("Reshape", y, _shape(b, place))
        new.shape, new.type = place.y.shape, place.y.type
        for initializer in b.tape.initializers:
            model.graph.register_initializer(initializer)
        convenience.replace_nodes_and_values(model.graph, place.nodes[-1], place.nodes, b.tape.nodes, [place.y], [new])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    if any(layer.int8 for layer in layers.values()):
        model.opset_imports[MICROSOFT] = 1


def _shape(b: Builder, place: Place) -> ir.Value:
    """The shape of the output: constant as far as at most one side is unknown."""
    assert place.y.shape is not None
    sides = [side if isinstance(side, int) else -1 for side in place.y.shape]
    if sides.count(-1) <= 1:
        return b.numbers(*sides)
    return b.op("Concat", b.op("Shape", place.x, end=-1), b.numbers(sides[-1]), axis=0)


def _rank(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)
