"""LoRA-GA's start: nothing changes at first, and the first step is the best that rank 2r allows (arXiv 2407.05000)."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.lora import MaskedLoraLinear
from lpvit_cli.lora.init import kept_gradients, lora_ga_init
from lpvit_cli.sparse import BlockSparseLinear, densify, sparsify

SHAPE, BLOCK, RANK = (48, 64), (8, 16), 6


def started(density: float, dtype: torch.dtype = torch.float64) -> tuple[MaskedLoraLinear, Tensor, Tensor]:
    """An adapter after lora_ga_init, its masked gradient, and the weight before."""
    weight, mask = masked(SHAPE, BLOCK, density)
    dense = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    dense.weight.data = weight.to(dtype)
    adapter = MaskedLoraLinear(BlockSparseLinear.from_linear(dense, BLOCK, mask), RANK, alpha=16.0)
    before = adapter.base.weight.to_dense().detach().clone()
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(SHAPE, generator=generator, dtype=dtype) * expanded(mask, SHAPE, BLOCK)
    lora_ga_init(adapter, BlockSparseMatrix.from_dense(gradient, BLOCK, mask), gamma=16.0)
    return adapter, gradient, before


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_the_output_is_unchanged(density: float) -> None:
    adapter, _, before = started(density)
    x = torch.randn(5, SHAPE[1], dtype=torch.float64)
    assert relative(adapter(x), F.linear(x, before, adapter.base.bias)) < 1e-12
    assert adapter.delta_values().norm() > 0.1, "the product itself is not zero: W0 absorbed it"


def test_the_output_is_unchanged_in_half_precision_too() -> None:
    """W0 nearly cancels the product at first: rounding the product before the sum would show, rounding the sum does not."""
    adapter, _, before = started(0.5, torch.float32)
    adapter.lora_a.data *= 30
    adapter.base.values.data -= adapter.delta_values() * (1 - 1 / 30)
    x = torch.randn(70, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, before, adapter.base.bias)
        assert relative(adapter(x), expected) < 1e-2  # bfloat16 has 8 bits


def test_factors_are_scaled_singular_vectors_without_singular_values() -> None:
    adapter, gradient, _ = started(0.5)
    scale = SHAPE[0] ** 0.25 / 4.0  # out^(1/4) / sqrt(gamma)
    for factor in (adapter.lora_a, adapter.lora_b.T):
        assert relative(factor @ factor.T, torch.eye(RANK, dtype=torch.float64) * scale**2) < 1e-12
    s = torch.linalg.svdvals(gradient)
    captured = adapter.lora_b.T @ gradient / scale
    assert relative(captured.norm(dim=1), s[RANK : 2 * RANK]) < 1e-10  # B holds left vectors r+1 .. 2r
    assert relative((gradient @ adapter.lora_a.T / scale).norm(dim=0), s[:RANK]) < 1e-10  # A holds right vectors 1 .. r


def test_first_step_is_the_best_of_rank_2r() -> None:
    """The error of one SGD step as an approximation of the gradient is Eckart and Young's for rank 2r (all blocks kept)."""
    adapter, gradient, _ = started(1.0)
    scale = SHAPE[0] ** 0.25 / 4.0
    step = 1e-6

    def weight() -> Tensor:
        return adapter.base.weight.to_dense() + adapter.delta_weight().to_dense()

    start = weight().detach()
    (weight() * gradient).sum().backward()  # dL/dW = gradient
    with torch.no_grad():
        adapter.lora_a -= step * adapter.lora_a.grad
        adapter.lora_b -= step * adapter.lora_b.grad
    moved = (start - weight().detach()) / (step * adapter.eta**2 * scale**2)
    s = torch.linalg.svdvals(gradient)
    best = s[2 * RANK :].square().sum().sqrt()
    assert float((gradient - moved).norm()) == pytest.approx(float(best), rel=1e-4)


def test_rank_beyond_half_of_the_layer_is_refused() -> None:
    weight, mask = masked(SHAPE, BLOCK, 1.0)
    dense = nn.Linear(SHAPE[1], SHAPE[0])
    dense.weight.data = weight
    adapter = MaskedLoraLinear(BlockSparseLinear.from_linear(dense, BLOCK, mask), rank=25)
    with pytest.raises(ValueError, match="2 x rank <= min"):
        lora_ga_init(adapter, adapter.base.weight)


def test_gradients_are_averaged_over_batches_and_masked(tiny_vit: nn.Module) -> None:
    mask = torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    sparsify(tiny_vit, {"blocks.1.mlp.fc1": mask}, (8, 16))
    dense = densify(tiny_vit).double()
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))) for _ in range(3)]
    found = kept_gradients(tiny_vit, batches, lambda x, y: F.cross_entropy(tiny_vit(x), y))["blocks.1.mlp.fc1"]
    weight = dense.get_submodule("blocks.1.mlp.fc1").weight.requires_grad_()
    for x, y in batches:
        (F.cross_entropy(dense(x.double()), y) / 3).backward()
    expected = weight.grad * expanded(mask, tuple(weight.shape), (8, 16))
    assert relative(found.to_dense(), expected) < 1e-4
    assert tiny_vit.get_submodule("blocks.1.mlp.fc1").values.grad is None
