"""BlockSparseLinear in a timm model: same numbers as the masked dense layer, and no dense copy anywhere."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BlockSparseMatrix
from torch import nn

from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.recovery.lora import adapt
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers, sparsify

BLOCK = (8, 16)


def random_masks(model: nn.Module, density: float = 0.5) -> dict[str, torch.Tensor]:
    layers = prunable_layers(model, Layers())
    return {
        name: masked(tuple(layer.weight.shape), BLOCK, density, seed)[1] for seed, (name, layer) in enumerate(layers.items())
    }


def test_sparsified_model_computes_what_the_masked_dense_one_does(tiny_vit: nn.Module) -> None:
    masks = random_masks(tiny_vit)
    x = torch.randn(3, 3, 32, 32)
    sparsify(tiny_vit, masks, BLOCK)
    masked_dense = densify(tiny_vit)
    assert relative(tiny_vit(x), masked_dense.double()(x.double())) < 1e-5
    for name, mask in masks.items():
        weight = masked_dense.get_submodule(name).weight
        assert not weight[~expanded(mask, tuple(weight.shape), BLOCK)].any()
        assert isinstance(tiny_vit.get_submodule(name), BlockSparseLinear), "densify must leave its argument alone"


def test_kept_weights_and_biases_are_those_of_the_dense_model(tiny_vit: nn.Module) -> None:
    before = {name: (layer.weight.clone(), layer.bias.clone()) for name, layer in prunable_layers(tiny_vit, Layers()).items()}
    masks = random_masks(tiny_vit)
    sparsify(tiny_vit, masks, BLOCK)
    for name, layer in sparse_layers(tiny_vit).items():
        weight, bias = before[name]
        assert torch.equal(layer.weight.to_dense(), weight * expanded(masks[name], tuple(weight.shape), BLOCK))
        assert torch.equal(layer.bias, bias)


def test_state_holds_the_kept_blocks_and_nothing_as_large_as_the_weight() -> None:
    dense = nn.Linear(64, 48)
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2, 1] = mask[5, 3] = True
    layer = BlockSparseLinear.from_linear(dense, BLOCK, mask)
    layer(torch.randn(2, 64)).sum().backward()
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "values": (2, 8, 16),
        "row_ptr": (7,),
        "cols": (2,),
        "bias": (48,),
    }
    tensors = [*layer.parameters(), *layer.buffers(), *(p.grad for p in layer.parameters())]
    assert max(tensor.numel() for tensor in tensors if tensor is not None) == 2 * 8 * 16


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_reach_values_and_bias(bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(40, 20, bias=bias)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])  # ragged at both edges
    layer = BlockSparseLinear.from_linear(dense, BLOCK, mask)
    elements = expanded(mask, (20, 40), BLOCK)
    dense.weight.data *= elements
    x, dy = torch.randn(70, 40), torch.randn(70, 20)
    layer(x).backward(dy)
    dense.double()(x.double()).backward(dy.double())
    gradient = BlockSparseMatrix.from_dense(dense.weight.grad, BLOCK, mask)
    assert relative(layer.values.grad, gradient.values) < 1e-5
    assert layer.bias is None if not bias else relative(layer.bias.grad, dense.bias.grad) < 1e-5


def test_values_loaded_later_are_the_ones_used(tiny_vit: nn.Module) -> None:
    sparsify(tiny_vit, random_masks(tiny_vit), BLOCK)
    x = torch.randn(1, 3, 32, 32)
    first = tiny_vit(x)
    state = {name: t * 2 if name.endswith(".values") else t for name, t in tiny_vit.state_dict().items()}
    tiny_vit.load_state_dict(state)
    assert relative(tiny_vit(x), densify(tiny_vit)(x)) < 1e-5
    assert relative(tiny_vit(x), first) > 0.01


def test_another_float_type_leaves_the_indices_whole_numbers(tiny_vit: nn.Module) -> None:
    sparsify(tiny_vit, random_masks(tiny_vit), BLOCK)
    x = torch.randn(1, 3, 32, 32)
    expected = tiny_vit(x)
    layer = next(iter(sparse_layers(tiny_vit).values()))
    assert relative(tiny_vit.double()(x.double()), expected) < 1e-5
    assert (layer.values.dtype, layer.cols.dtype) == (torch.float64, torch.int32)


def test_a_layer_that_was_evaluated_first_can_be_trained(tiny_vit: nn.Module) -> None:
    """Indices derived in inference mode cannot be used by autograd."""
    sparsify(tiny_vit, random_masks(tiny_vit), BLOCK)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tiny_vit(x)
    adapters = adapt(tiny_vit, dict.fromkeys(sparse_layers(tiny_vit), 2), alpha=4.0)
    tiny_vit(x).square().sum().backward()
    assert all(bool(adapter.lora_b.grad.any()) for adapter in adapters.values())


def test_nothing_is_shared_with_the_dense_layer() -> None:
    dense, mask = nn.Linear(64, 48), torch.ones(6, 4, dtype=torch.bool)
    layers = [BlockSparseLinear.from_linear(dense, BLOCK, mask) for _ in range(2)]
    tensors = [*dense.parameters(), *(tensor for layer in layers for tensor in layer.state_dict().values())]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_a_layer_of_two_names_is_dense_under_both() -> None:
    layer = BlockSparseLinear.from_linear(nn.Linear(32, 32), BLOCK, masked((32, 32), BLOCK, 0.5)[1])
    model = nn.ModuleDict({"one": layer, "other": nn.Sequential(layer)})
    dense = densify(model)
    assert type(dense["one"]) is nn.Linear
    assert dense["one"] is dense["other"][0]
