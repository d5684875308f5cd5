"""MaskedLoraLinear against the dense formula W_eff = M o (W0 + eta B A) in float64."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BlockSparseMatrix
from torch import nn
from torch.nn import functional as F

from lpvit_cli.recovery.lora import MaskedLoraLinear, adapt, merge
from lpvit_cli.sparse import BlockSparseLinear, sparse_layers, sparsify

CASES = [((48, 64), (8, 16)), ((48, 64), (16, 16)), ((44, 60), (8, 16)), ((20, 33), (20, 8))]  # the last two ragged


def adapter_of(shape: tuple[int, int], block: tuple[int, int], rank: int = 4, density: float = 0.4) -> MaskedLoraLinear:
    weight, mask = masked(shape, block, density)
    dense = nn.Linear(shape[1], shape[0])
    dense.weight.data = weight
    adapter = MaskedLoraLinear(BlockSparseLinear.from_linear(dense, block, mask), rank, alpha=8.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in (adapter.lora_a, adapter.lora_b):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapter


def effective(adapter: MaskedLoraLinear, block: tuple[int, int]) -> torch.Tensor:
    """M o (W0 + eta B A) as a dense float64 matrix, eta = alpha / sqrt(rank) written out."""
    base = adapter.base.weight.to_dense().double()
    mask = expanded(adapter.base.weight.block_mask, tuple(base.shape), block)
    eta = 8.0 / adapter.rank**0.5
    return mask * (base + eta * adapter.lora_b.double() @ adapter.lora_a.double())


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_forward_is_the_masked_sum(shape: tuple[int, int], block: tuple[int, int]) -> None:
    adapter = adapter_of(shape, block)
    for tokens in (5, 70):
        x = torch.randn(2, tokens, shape[1])
        expected = F.linear(x.double(), effective(adapter, block), adapter.base.bias.double())
        assert relative(adapter(x), expected) < 1e-5


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_delta_weight_is_zero_outside_the_mask_exactly(shape: tuple[int, int], block: tuple[int, int]) -> None:
    adapter = adapter_of(shape, block)
    delta = adapter.delta_weight().to_dense()
    mask = expanded(adapter.base.weight.block_mask, shape, block)
    assert not delta[~mask].any()
    assert relative(delta, effective(adapter, block) - adapter.base.weight.to_dense().double()) < 1e-5


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_gradients_of_a_and_b_are_those_of_the_dense_formula(shape: tuple[int, int], block: tuple[int, int]) -> None:
    adapter = adapter_of(shape, block)
    x, dy = torch.randn(70, shape[1]), torch.randn(70, shape[0])
    adapter(x).backward(dy)
    got = adapter.lora_a.grad.clone(), adapter.lora_b.grad.clone()
    a, b = adapter.lora_a.detach().double().requires_grad_(), adapter.lora_b.detach().double().requires_grad_()
    mask = expanded(adapter.base.weight.block_mask, shape, block)
    weight = mask * (adapter.base.weight.to_dense().detach().double() + 8.0 / adapter.rank**0.5 * b @ a)
    F.linear(x.double(), weight, adapter.base.bias.detach().double()).backward(dy.double())
    assert relative(got[0], a.grad) < 1e-5
    assert relative(got[1], b.grad) < 1e-5
    assert adapter.base.values.grad is None, "W0 is frozen"


@pytest.mark.parametrize(("shape", "block"), CASES)
def test_merge_keeps_output_and_zeros(shape: tuple[int, int], block: tuple[int, int]) -> None:
    adapter = adapter_of(shape, block)
    x = torch.randn(70, shape[1])
    before, mask, expected = adapter(x), adapter.base.weight.block_mask.clone(), effective(adapter, block)
    layer = adapter.merge()
    assert relative(layer(x), before) < 1e-5
    assert relative(layer.weight.to_dense(), expected) < 1e-5
    assert not layer.weight.to_dense()[~expanded(mask, shape, block)].any()
    assert torch.equal(layer.weight.block_mask, mask)


def test_an_adapter_starts_by_changing_nothing() -> None:
    weight, mask = masked((48, 64), (8, 16), 0.5)
    dense = nn.Linear(64, 48)
    dense.weight.data = weight
    layer = BlockSparseLinear.from_linear(dense, (8, 16), mask)
    x = torch.randn(9, 64)
    before = layer(x)
    adapter = MaskedLoraLinear(layer, rank=4)
    assert torch.equal(adapter(x), before)
    assert adapter.lora_a.any(), "with both factors zero no gradient would ever flow"


def test_a_layer_that_lost_all_its_blocks_still_gives_its_bias() -> None:
    layer = BlockSparseLinear.from_linear(nn.Linear(64, 48), (8, 16), torch.zeros(6, 4, dtype=torch.bool))
    adapter = MaskedLoraLinear(layer, rank=4)
    y = adapter(torch.randn(60, 64))
    assert torch.equal(y, layer.bias.expand(60, 48))
    y.sum().backward()
    assert not adapter.merge().weight.to_dense().any()


def test_merging_restores_the_layers(tiny_vit: nn.Module) -> None:
    masks = {f"blocks.{i}.mlp.fc1": torch.rand(16, 2) < 0.6 for i in range(2)}
    sparsify(tiny_vit, masks, (8, 16))
    names = set(sparse_layers(tiny_vit))
    x = torch.randn(2, 3, 32, 32)
    before = tiny_vit(x)
    assert set(adapt(tiny_vit, dict.fromkeys(names, 4), alpha=8.0)) == names
    merge(tiny_vit)
    assert set(sparse_layers(tiny_vit)) == names
    assert relative(tiny_vit(x), before) < 1e-6


def test_peft_agrees_when_every_block_is_kept() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 48))
    ours = MaskedLoraLinear(
        BlockSparseLinear.from_linear(dense[0], (8, 16), torch.ones(6, 4, dtype=torch.bool)), rank=4, alpha=8.0
    )
    config = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(dense, config)
    layer = theirs.base_model.model[0]
    ours.lora_a.data, ours.lora_b.data = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    x = torch.randn(7, 64)
    assert relative(ours(x), theirs(x)) < 1e-5


def test_the_weight_in_use_is_not_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made again there: kept, the weights of all layers would take as much memory as the model."""
    adapter = adapter_of((48, 64), (8, 16))
    made = []
    effective_weight = MaskedLoraLinear.effective_weight

    def recorded(self: MaskedLoraLinear) -> BlockSparseMatrix:
        weight = effective_weight(self)
        made.append(weakref.ref(weight.values))
        return weight

    monkeypatch.setattr(MaskedLoraLinear, "effective_weight", recorded)
    for precision in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        made.clear()
        with precision:
            y = adapter(torch.randn(70, 64))
        gc.collect()
        assert [values() for values in made] == [None]
        y.sum().backward()
        assert len(made) == 2
