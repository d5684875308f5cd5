"""A model for inference whose block-sparse layers were told once and for all how to run."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from lpvit_kernels import backends, dispatch
from torch import Tensor, nn

from lpvit_cli.sparse.fused import fuse
from lpvit_cli.sparse.layers import BlockSparseLinear, EpilogueLinear, dense_layer, layer_tokens, sparse_layers

Model = TypeVar("Model", bound=nn.Module)

_gelu_in_place = torch.ops.aten.gelu_.default


class FrozenLinear(EpilogueLinear):
    """y = x W^T + b by the one product it was given; without gradients, in the type of its weight."""

    bias: Tensor

    def __init__(self, product: nn.Module, bias: Tensor, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.product = product
        self.register_buffer("bias", bias)

    def forward(
        self,
        x: Tensor,
        activation: Literal["gelu"] | None = None,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `BlockSparseLinear`."""
        bias = self.bias
        if x.dtype != bias.dtype:  # under autocast
            x = x.to(bias.dtype)
        rows = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        y: Tensor = self.product.forward(rows).add_(bias)  # without what the call of a module costs
        if activation:
            _gelu_in_place(y)
        if scale is not None:
            y.mul_(scale)
        if x.ndim != 2:
            y = y.view(*x.shape[:-1], self.out_features)
        return y if residual is None else y.add_(residual)


def freeze(model: Model, batch: int | Tensor) -> Model:
    """A fused copy for inference on batches of this size, whose block-sparse layers look nothing up any more.

    What runs each layer fastest, by tuning or else by rule of thumb, is bound: layers that run dense become nn.Linear, the
    others hold their weight packed as their product needs it. Other batch sizes give the same, perhaps more slowly. There are
    no gradients, and the state of a frozen model cannot be loaded back: keep the original. On a GPU only layers that run dense
    change. A model without block-sparse layers is given back as it is.

    `batch`: so many images of the size in `model.pretrained_cfg`, or such a batch. Frozen under autocast, layers hold their
    weights in its type, and the model must run under it too.
    """
    if not sparse_layers(model):
        return model
    frozen = fuse(model).requires_grad_(False)
    size, example = (batch, None) if isinstance(batch, int) else (len(batch), batch[:1])
    layers = sparse_layers(frozen)
    made = {layers[name]: _frozen(layers[name], size * n) for name, n in layer_tokens(frozen, example=example).items()}
    for name, layer in list(frozen.named_modules(remove_duplicate=False)):  # a layer may have several names
        if isinstance(layer, BlockSparseLinear) and layer in made:
            frozen.set_submodule(name, made[layer])
    return frozen


def _frozen(layer: BlockSparseLinear, tokens: int) -> nn.Module:
    weight, device = layer.weight, layer.values.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(device))
    choice = dispatch.choose("forward", "auto", weight.values.new_empty(tokens, 0), weight)
    if device != "cpu" and choice.backend != "dense":
        return layer
    product = backends.bound(choice, weight)
    if product is None:
        return dense_layer(layer).to(weight.dtype).requires_grad_(False)
    bias = weight.values.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return FrozenLinear(product, bias.detach().to(weight.dtype), *weight.shape)
