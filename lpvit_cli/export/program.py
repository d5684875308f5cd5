"""A model as a torch.export program of torch's own operators: runs in plain torch, without lpvit."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F

from lpvit_cli.export.layer import ExportLayer
from lpvit_cli.models.protocol import VisionModel

FORMS = ("dense", "rows")


class BlockRows(nn.Module):
    """y = x W^T + b in torch's operators: per block row, the slices of x that it needs are gathered for one small product.

    Of the ways to write it this is the fastest on a CPU: at 197 tokens, 3072 x 768 and 70 % removed in 128x32 blocks 2.5x
    faster than dense, where one batched product for all rows, and a product per block, have 1.9x.
    """

    def __init__(self, layer: ExportLayer):
        super().__init__()
        rows, (_, self.width), (_, self.columns) = layer.merged_rows, layer.weight.block, layer.weight.grid
        self.padding = self.columns * self.width - layer.weight.shape[1]
        self.factors = nn.ParameterList(row.factor(self.width) for row in rows)  # [kept C, R] each
        self.biases = None if layer.bias is None else nn.ParameterList(row.bias for row in rows)
        for i, row in enumerate(rows):
            self.register_buffer(f"kept_{i}", torch.tensor(row.columns))

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        slices = (F.pad(x, (0, self.padding)) if self.padding else x).reshape(-1, self.columns, self.width)
        pieces = []
        for i, factor in enumerate(self.factors):
            part = slices.index_select(1, self.get_buffer(f"kept_{i}")).flatten(1)  # [tokens, kept C]
            pieces.append(part @ factor if self.biases is None else torch.addmm(self.biases[i], part, factor))
        return torch.cat(pieces, dim=1).unflatten(0, x.shape[:-1])


def as_module(layer: ExportLayer, form: str) -> nn.Module:
    """`layer` in one of FORMS."""
    if form == "rows":
        return BlockRows(layer)
    dense = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(layer.weight.to_dense().detach())
    dense.register_parameter("bias", None if layer.bias is None else nn.Parameter(layer.bias.detach()))
    return dense


def plain(model: VisionModel, layers: Mapping[str, ExportLayer], forms: Mapping[str, str]) -> VisionModel:
    """A copy of `model` in eval mode without gradients, each of `layers` in its form."""
    made = copy.deepcopy(model)
    for name, layer in layers.items():
        made.set_submodule(name, as_module(layer, forms[name]))
    return made.eval().requires_grad_(False)


def export_program(model: VisionModel) -> ExportedProgram:
    """images [batch, 3, H, W] float32 -> logits [batch, classes]; any batch. `model` holds torch's operators only.

    It does not tell the files of this machine that its operators come from.
    """
    images = torch.zeros(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch")},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program
