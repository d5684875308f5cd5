"""LoRA-GA's start: nothing changes at first, and the first step is the best that rank 2r allows (arXiv 2407.05000)."""

from __future__ import annotations

import pytest
import torch
from helpers import expanded, masked, relative
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn
from torch.nn import functional as F

from lpvit_cli.recovery.lora import MaskedLoraLinear, kept_gradients, lora_ga_factors
from lpvit_cli.sparse import BlockSparseLinear, densify, sparsify

SHAPE, BLOCK, RANK = (48, 64), (8, 16), 6


def started(density: float, dtype: torch.dtype = torch.float64) -> tuple[MaskedLoraLinear, Tensor, Tensor]:
    """An adapter started from a gradient, its masked gradient, and the weight before."""
    weight, mask = masked(SHAPE, BLOCK, density)
    dense = nn.Linear(SHAPE[1], SHAPE[0], dtype=dtype)
    dense.weight.data = weight.to(dtype)
    adapter = MaskedLoraLinear(BlockSparseLinear.from_linear(dense, BLOCK, mask), RANK, alpha=16.0)
    before = adapter.base.weight.to_dense().detach().clone()
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(SHAPE, generator=generator, dtype=dtype) * expanded(mask, SHAPE, BLOCK)
    adapter.start(*lora_ga_factors(BlockSparseMatrix.from_dense(gradient, BLOCK, mask), RANK, gamma=16.0))
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
    with pytest.raises(ValueError, match="2 x rank <= min"):
        lora_ga_factors(BlockSparseMatrix.from_dense(weight, BLOCK, mask), rank=25)


def test_gradients_are_averaged_over_batches_and_masked(tiny_vit: nn.Module) -> None:
    names, generator = ["blocks.1.mlp.fc1", "blocks.0.mlp.fc1"], torch.Generator().manual_seed(0)
    masks = {name: torch.rand(16, 2, generator=generator) < 0.5 for name in names}
    sparsify(tiny_vit, masks, (8, 16))
    dense = densify(tiny_vit).double()
    images, labels = torch.randn(9, 3, 32, 32), torch.randint(5, (9,))
    passes: list[int] = []

    def batches() -> list[tuple[Tensor, Tensor]]:
        passes.append(1)
        return list(zip(images.split(4), labels.split(4), strict=True))

    weights = {name: dense.get_submodule(name).weight.requires_grad_() for name in names}
    F.cross_entropy(dense(images.double()), labels).backward()
    for memory_bytes in (2**20, 1):
        passes.clear()
        found = kept_gradients(tiny_vit, names, batches, lambda x, y: F.cross_entropy(tiny_vit(x), y), memory_bytes)
        for name, gradient in found:
            expected = weights[name].grad * expanded(masks[name], tuple(weights[name].shape), (8, 16))
            assert relative(gradient.to_dense(), expected) < 1e-4
        assert len(passes) == (1 if memory_bytes > 1 else len(names)), "one pass, or one for each layer"
    assert not any(parameter.requires_grad for parameter in tiny_vit.parameters())


def test_the_randomized_start_spans_what_the_exact_one_does() -> None:
    """A gradient with a falling spectrum, large enough for the randomized SVD: its subspaces agree with LAPACK's."""
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    gradient = u @ torch.diag(0.7 ** torch.arange(256, dtype=torch.float64)) @ v.T
    torch.manual_seed(0)
    a, b = lora_ga_factors(BlockSparseMatrix.from_dense(gradient, (64, 64)), rank=8)
    scale = 256**0.25 / 4
    assert relative(a.T @ a / scale**2, v[:, :8] @ v[:, :8].T) < 1e-8
    assert relative(b @ b.T / scale**2, u[:, 8:16] @ u[:, 8:16].T) < 1e-8
    assert (a @ v[:, :8]).diagonal().abs().min() > 0.99 * scale, "one vector each, not a rotation of them"


def test_the_free_signs_are_chosen() -> None:
    """The same gradient, computed with other rounding, starts alike."""
    weight, mask = masked(SHAPE, BLOCK, 0.5)
    gradient = BlockSparseMatrix.from_dense(weight.double(), BLOCK, mask)
    a, b = lora_ga_factors(gradient, RANK)
    noisy = gradient.with_values(gradient.values * (1 + 1e-9 * torch.randn_like(gradient.values)))
    for found, expected in zip(lora_ga_factors(noisy, RANK), (a, b), strict=True):
        assert relative(found, expected) < 1e-6
    left = torch.linalg.svd(gradient.to_dense()).U[:, RANK : 2 * RANK]
    assert relative(b, left * left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign() * SHAPE[0] ** 0.25 / 4) < 1e-8


def test_peft_starts_alike_when_every_block_is_kept() -> None:
    """Up to sign, and to the singular values and the scale that peft multiplies B by and the paper does not."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    from peft.tuners.lora import LoraGAConfig, preprocess_loraga

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
    x, target = torch.randn(200, SHAPE[1]), torch.randn(200, SHAPE[0])
    layer = BlockSparseLinear.from_linear(dense[0], BLOCK, torch.ones(6, 4, dtype=torch.bool))
    ours = nn.Sequential(layer)
    before = dense[0].weight.detach().clone()
    found = kept_gradients(ours, ["0"], lambda: [(x, target)], lambda a, b: F.mse_loss(ours(a), b))
    adapter = MaskedLoraLinear(layer, RANK, alpha=16.0)
    for _, gradient in found:
        s = torch.linalg.svdvals(gradient.to_dense().double())
        adapter.start(*lora_ga_factors(gradient, RANK))

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction="ArB2r", scale="unit"),
    )
    preprocess_loraga(dense, config, lambda: F.mse_loss(dense(x), target).backward())
    theirs = peft.get_peft_model(dense, config).base_model.model[0]
    scale = SHAPE[0] ** 0.25 / 4.0
    for a, their_a in zip(adapter.lora_a / scale, theirs.lora_A["default"].weight, strict=True):
        assert min(relative(a, their_a), relative(-a, their_a)) < 1e-2  # their SVD is randomized
    for b, their_b, size in zip(adapter.lora_b.T / scale, theirs.lora_B["default"].weight.T, s[RANK:], strict=False):
        assert min(relative(b * size, their_b), relative(-b * size, their_b)) < 1e-2
    assert adapter.eta == pytest.approx(theirs.scaling["default"])
    assert relative(adapter.effective_weight().to_dense(), before) < 1e-6
