"""A block-sparse linear layer written in ONNX operators, so that a stock runtime skips what was removed.

    dense     one product, zeros included
    rows      per block row, the slices of x that it needs are gathered for one small product
    chain     per block row a product for each block, added to the one before; nothing is gathered
    batched   the slices of all block rows are gathered at once, for one batched product or a few where their counts differ

All compute x W^T + b, [tokens, in] -> [tokens, out]. In int8, x is quantised once as a whole, by the range found or calibrated,
the weights by output feature; the products sum in int32 and give float32. There is no int8 chain: its sums would round anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.export.layer import ExportLayer, Row

MICROSOFT = "com.microsoft"  # where onnxruntime keeps the int8 product with a float result
BATCH_SIZES = 8  # of `batched`: block rows are padded to one of so many counts


class Builder:
    """Nodes and initializers being made for one layer."""

    def __init__(self, layer: ExportLayer):
        self.tape, self.layer = Tape(), layer

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: int | str | Sequence[int]) -> ir.Value:
        return self.tape.op(name, inputs, attributes, domain=domain)

    def ops(self, name: str, outputs: int, *inputs: ir.Value, **attributes: int) -> Sequence[ir.Value]:
        return self.tape.op_multi_out(name, inputs, attributes, num_outputs=outputs)

    def constant(self, tensor: Tensor) -> ir.Value:
        name = f"{self.layer.name}.{len(self.tape.initializers)}"
        return self.tape.initializer(ir.tensor(tensor.detach().contiguous(), name=name))

    def numbers(self, *values: int) -> ir.Value:
        return self.constant(torch.tensor(values, dtype=torch.int64))


class Floats:
    """The input x [tokens, in] of a layer, and products with it."""

    def __init__(self, b: Builder, x: ir.Value):
        self.b, self.x = b, x

    def product(self, part: ir.Value, factor: Tensor, bias: Tensor | None = None) -> ir.Value:
        """part [tokens, k], factor [k, n], bias [n] -> [tokens, n]; or without a bias [g, tokens, k] and [g, k, n]."""
        if bias is None:
            return self.b.op("MatMul", part, self.b.constant(factor))
        return self.b.op("Gemm", part, self.b.constant(factor), self.b.constant(bias))


class Int8(Floats):
    """The same in uint8 x int8, with floats as the result."""

    def __init__(self, b: Builder, x: ir.Value):
        if b.layer.x_range is None:
            x, self.scale, self.zero = b.ops("DynamicQuantizeLinear", 3, x)
        else:
            scale, zero = affine(*b.layer.x_range)
            self.scale, self.zero = b.constant(torch.tensor(scale)), b.constant(torch.tensor(zero, dtype=torch.uint8))
            x = b.op("QuantizeLinear", x, self.scale, self.zero)
        super().__init__(b, x)

    def product(self, part: ir.Value, factor: Tensor, bias: Tensor | None = None) -> ir.Value:
        scale = factor.abs().amax(dim=-2, keepdim=True).clamp(min=1e-12) / 127  # by output feature
        whole = self.b.constant((factor / scale).round().to(torch.int8))
        scales = self.b.constant(scale if factor.ndim == 3 else scale[0])
        biases = [] if bias is None else [self.b.constant(bias)]
        return self.b.op("MatMulIntegerToFloat", part, whole, self.scale, scales, self.zero, None, *biases, domain=MICROSOFT)


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of uint8 for values from low to high, zero being one of them, as DynamicQuantizeLinear has it."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, min(255, max(0, round(-low / scale)))


def dense(b: Builder, x: ir.Value) -> ir.Value:
    source = _source(b, x)
    return source.product(source.x, b.layer.weight.to_dense().T, b.layer.bias)


def rows(b: Builder, x: ir.Value) -> ir.Value:
    source, width = _source(b, x), b.layer.weight.block[1]
    slices = _slices(b, source.x)
    pieces = []
    for row in b.layer.merged_rows:
        part = b.op("Gather", slices, b.numbers(*row.columns), axis=1)
        part = b.op("Reshape", part, b.numbers(-1, len(row.columns) * width))
        pieces.append(source.product(part, row.factor(width), row.bias))
    return b.op("Concat", *pieces, axis=1) if len(pieces) > 1 else pieces[0]


def chain(b: Builder, x: ir.Value) -> ir.Value:
    features, width = b.layer.weight.shape[1], b.layer.weight.block[1]
    sizes = [min(width, features - at) for at in range(0, features, width)]
    slices = b.ops("Split", len(sizes), x, b.numbers(*sizes), axis=1) if len(sizes) > 1 else [x]
    pieces = []
    for row in b.layer.merged_rows:
        sums = [] if row.bias is None else [b.constant(row.bias)]
        for column, block in zip(row.columns, row.blocks, strict=True):
            sums = [b.op("Gemm", slices[column], b.constant(block), *sums)]
        pieces += sums
    return b.op("Concat", *pieces, axis=1) if len(pieces) > 1 else pieces[0]


def batched(b: Builder, x: ir.Value) -> ir.Value:
    source, layer = _source(b, x), b.layer
    out, (height, width), lines = layer.weight.shape[0], layer.weight.block, layer.weight.grid[0]
    slices = _slices(b, source.x)
    products, order = [], []
    for count, batch in _batches(layer.rows):
        columns = [column for row in batch.values() for column in (*row.columns, *[0] * (count - len(row.columns)))]
        part = b.op("Gather", slices, b.numbers(*columns), axis=1)
        part = b.op("Reshape", part, b.numbers(-1, len(batch), count * width))
        factors = [
            F.pad(row.factor(width), (0, height - row.width, 0, (count - len(row.columns)) * width)) for row in batch.values()
        ]
        products.append(source.product(b.op("Transpose", part, perm=(1, 0, 2)), torch.stack(factors)))
        order += list(batch)
    y = b.op("Concat", *products, axis=0) if len(products) > 1 else products[0]
    if order != sorted(order):
        y = b.op("Gather", y, b.numbers(*(order.index(line) for line in range(lines))), axis=0)
    y = b.op("Reshape", b.op("Transpose", y, perm=(1, 0, 2)), b.numbers(-1, lines * height))
    if out % height:
        y = b.op("Slice", y, b.numbers(0), b.numbers(out), b.numbers(1))
    return y if layer.bias is None else b.op("Add", y, b.constant(layer.bias))


FORMS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {"dense": dense, "rows": rows, "chain": chain, "batched": batched}


def forms_of(layer: ExportLayer) -> list[str]:
    """Those that can be told apart for this layer."""
    if layer.weight.density == 1:
        return ["dense"]
    return [form for form in FORMS if not (layer.int8 and form == "chain")]


def _source(b: Builder, x: ir.Value) -> Floats:
    return Int8(b, x) if b.layer.int8 else Floats(b, x)


def _slices(b: Builder, x: ir.Value) -> ir.Value:
    """[tokens, in] -> [tokens, in / C, C], the last slice filled up with zeros."""
    (_, features), (_, width), (_, columns) = b.layer.weight.shape, b.layer.weight.block, b.layer.weight.grid
    if features % width:
        x = b.op("Pad", x, b.numbers(0, 0, 0, columns * width - features))
    return b.op("Reshape", x, b.numbers(-1, columns, width))


def _batches(block_rows: Sequence[Row]) -> list[tuple[int, dict[int, Row]]]:
    """Block rows by their counts, each rounded up to one of BATCH_SIZES; the count is that of the longest row of a batch."""
    step = -(-max(len(row.columns) for row in block_rows) // BATCH_SIZES)
    batches: dict[int, dict[int, Row]] = {}
    for i, row in enumerate(block_rows):
        batches.setdefault(-(-len(row.columns) // step), {})[i] = row
    return [(max(len(row.columns) for row in batch.values()), batch) for _, batch in sorted(batches.items())]
