"""`BlockSparseLinear` takes the place of an `nn.Linear` and holds its kept blocks only."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal, TypeVar

import torch
from lpvit_kernels import BlockSparseMatrix, linear
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EpilogueLinear(nn.Module):
    """A linear layer that takes what follows it: forward(x, activation, scale, residual) as in `BlockSparseLinear`."""


class BlockSparseLinear(EpilogueLinear):
    """y = x W^T + b with a block-sparse W [out, in].

    State: `values` [nnz, R, C] (a parameter), `row_ptr` [out/R + 1] and `cols` [nnz] (int32), `bias` [out]. No dense copy.
    It takes over the tensors that it is made from: they must be no other layer's.
    """

    values: nn.Parameter
    row_ptr: Tensor
    cols: Tensor

    def __init__(self, weight: BlockSparseMatrix, bias: Tensor | None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(weight.values.detach())
        self.register_buffer("row_ptr", weight.row_ptr)
        self.register_buffer("cols", weight.cols)
        self.bias = None if bias is None else nn.Parameter(bias.detach())

    @classmethod
    def from_linear(cls, layer: nn.Linear, block: tuple[int, int], mask: Tensor) -> BlockSparseLinear:
        """Keep the blocks of `layer` where `mask` [ceil(out/R), ceil(in/C)] is True."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(BlockSparseMatrix.from_dense(layer.weight.detach(), block, mask), bias)

    @property
    def weight(self) -> BlockSparseMatrix:
        """The weight in use; differentiable in `values`."""
        return BlockSparseMatrix(self.values, self.row_ptr, self.cols, (self.out_features, self.in_features), check=False)

    def forward(
        self,
        x: Tensor,
        activation: Literal["gelu"] | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """act(x W^T + b) [* scale] [+ residual]; x [..., in], scale [out], residual and result [..., out]."""
        return linear(x, self.weight, self.bias, activation, residual, scale=scale)

    def extra_repr(self) -> str:
        rows, columns = self.values.shape[1:]
        return f"{self.in_features}, {self.out_features}, block={rows}x{columns}, density={self.weight.density:.2f}"


def sparsify(model: nn.Module, masks: dict[str, Tensor], block: tuple[int, int]) -> None:
    """Replace, in place, each named nn.Linear by the blocks its mask keeps."""
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(name, BlockSparseLinear.from_linear(layer, block, mask))


def sparse_layers(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def layer_tokens(model: nn.Module, names: Iterable[str] | None = None, example: Tensor | None = None) -> dict[str, int]:
    """Rows of x that one image gives each of these linear layers; None: the block-sparse ones. `example`: an input; None: an
    image of the size in `model.pretrained_cfg`."""
    tokens: dict[str, int] = {}

    def count(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens[name] = inputs[0].flatten(0, -2).shape[0]

        return hook

    watched = sparse_layers(model) if names is None else names
    handles = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in watched]  # type: ignore[arg-type]
    like, cfg = next(model.parameters()), getattr(model, "pretrained_cfg", {})
    size = cfg["input_size"] if example is None else example.shape[1:]
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return tokens


def densify(model: Model) -> Model:
    """A copy whose block-sparse layers are nn.Linear again, the removed blocks filled with zeros."""
    model = copy.deepcopy(model)
    made: dict[nn.Module, nn.Linear] = {}  # a layer may have several names
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, BlockSparseLinear):
            if layer not in made:
                made[layer] = dense_layer(layer)
            model.set_submodule(name, made[layer])
    return model


def dense_layer(layer: BlockSparseLinear) -> nn.Linear:
    """The removed blocks filled with zeros; its bias is that of `layer`."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(layer.weight.to_dense().detach())
    dense.register_parameter("bias", layer.bias)
    return dense
