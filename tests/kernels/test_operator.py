"""The operator as torch sees it: schema, autograd, compile, export, flops, memory."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import masked, relative
from lpvit_kernels import BlockSparseMatrix, backends, forget, linear, random_block_sparse
from lpvit_kernels.memo import _MEMO
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lpvit_cli.sparse import BlockSparseLinear

SHAPE, BLOCK = (64, 96), (32, 16)


def layer_of(density: float = 0.5, dtype: torch.dtype = torch.float32) -> BlockSparseLinear:
    weight, mask = masked(SHAPE, BLOCK, density)
    dense = nn.Linear(SHAPE[1], SHAPE[0])
    dense.weight.data = weight
    return BlockSparseLinear.from_linear(dense, BLOCK, mask).to(dtype)


def arguments(layer: BlockSparseLinear, backend: str, grad: bool) -> tuple[object, ...]:
    tensors = [torch.randn(5, 96), layer.values.detach().clone(), *torch.randn(2, 64), torch.randn(5, 64)]
    return (*(t.requires_grad_(grad) for t in tensors), layer.row_ptr, layer.cols, 64, "gelu", grad, backend)


@pytest.mark.parametrize("backend", ["strided", "gathered", "batched", "dense"])
def test_it_keeps_the_promises_of_its_schema(backend: str) -> None:
    """torch's own check: no argument is changed, no output is an alias, fake and real outputs agree, autograd is registered."""
    torch.library.opcheck(torch.ops.lpvit.block_sparse_linear.default, arguments(layer_of(), backend, grad=False))
    torch.library.opcheck(torch.ops.lpvit.block_sparse_linear.default, arguments(layer_of(), backend, grad=True))


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    found = [x.grad, *(p.grad.clone() for p in layer.parameters())]
    layer.zero_grad()
    return found  # type: ignore[return-value]


def test_it_compiles_into_one_graph_forward_and_backward() -> None:
    layer, x = layer_of(), torch.randn(2, 5, 96)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), layer(x).double()) < 1e-6
    for found, expected in zip(gradients(compiled, x), gradients(layer, x), strict=True):
        assert relative(found, expected.double()) < 1e-6
    assert compiled(torch.randn(3, 7, 96)).shape == (3, 7, 64)


def test_it_is_exported_with_a_free_number_of_tokens() -> None:
    layer, tokens = layer_of().eval(), torch.export.Dim("tokens", min=2, max=100)
    program = torch.export.export(layer, (torch.randn(4, 96),), dynamic_shapes={"x": {0: tokens}})
    x = torch.randn(9, 96)
    assert relative(program.module()(x), layer(x).double()) < 1e-6
    assert "lpvit.block_sparse_linear" in str(program.graph)


def test_flops_count_kept_blocks() -> None:
    layer, x = layer_of(), torch.randn(2, 5, 96, requires_grad=True)
    kept = 2 * 10 * layer.values.numel()
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == kept
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * kept


def test_training_stores_no_dense_weight_and_no_dense_gradient() -> None:
    """No tensor of the size of the weight is made, forward or backward."""
    layer = layer_of(0.3)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            self.largest = max(
                [self.largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))]
            )
            return out

    x = torch.randn(4, 96, requires_grad=True)
    for backend in ("strided", "gathered", "batched"):
        with Watch() as watch:
            linear(x, layer.weight, layer.bias, "gelu", backend=backend).sum().backward()
        assert watch.largest < 64 * 96
    with Watch() as watch:
        linear(x, layer.weight, layer.bias, backend="reference").sum().backward()
    assert watch.largest == 64 * 96, "the watch sees dense weights"


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("backend", ["strided", "dense", "reference"])
def test_scale_and_its_gradient(activation: str | None, backend: str) -> None:
    """LayerScale against the same in float64 and in separate steps."""
    weight, mask = masked(SHAPE, BLOCK, 0.5)
    matrix = BlockSparseMatrix.from_dense(weight.double(), BLOCK, mask)
    x, bias, scale, residual = (
        t.double().requires_grad_() for t in (torch.randn(5, 96), *torch.randn(2, 64), torch.randn(5, 64))
    )
    inputs = (x, bias, scale, residual)
    y = linear(x, matrix, bias, activation, residual, backend, scale=scale)  # type: ignore[arg-type]
    z = F.linear(x, matrix.to_dense(), bias)
    expected = (F.gelu(z) if activation else z) * scale + residual
    assert relative(y, expected) < 1e-14
    dy = torch.randn_like(y)
    for found, wanted in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        assert relative(found, wanted) < 1e-13


@pytest.mark.parametrize("backend", ["gathered", "dense"])
def test_packed_weights_follow_changes_of_the_values(backend: str) -> None:
    """What a backend keeps is made anew after a step of an optimizer, and after the values moved."""
    layer, x = layer_of(), torch.randn(5, 96)

    def error() -> float:
        return relative(linear(x, layer.weight, backend=backend), linear(x, layer.weight, backend="reference").double())

    with torch.no_grad():
        assert error() < 1e-6
        layer.values.mul_(2)
        assert error() < 1e-6
        layer.values.data = layer.values.data * 3
        assert error() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["gathered", "strided", "batched", "dense"])
def test_what_is_kept_of_a_weight_goes_with_it(backend: str, dtype: torch.dtype) -> None:
    gc.collect()
    before = len(_MEMO)
    for _ in range(3):
        matrix = random_block_sparse(SHAPE, BLOCK, 0.5, empty_rows=1, dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            linear(torch.randn(5, 96), matrix, backend=backend)
        with torch.no_grad():
            torch.ops.lpvit.block_sparse_input_gradient(
                torch.randn(5, 64).to(dtype), matrix.values, matrix.row_ptr, matrix.cols, 96, backend
            )
            assert matrix.by_row.order.shape == (2,)
            assert matrix.by_column.order.shape == (6,)
    del matrix
    gc.collect()
    assert len(_MEMO) == before


def optimized(backend: str, autocast: bool = False, compiled: bool = False) -> tuple[list[float], Tensor]:
    """Losses of 20 fused steps, each followed by an evaluation; the values at the end."""
    torch.manual_seed(0)
    layer, x, target = layer_of(), torch.randn(40, 96), torch.randn(40, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, fused=True)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.mse_loss(linear(x, layer.weight, layer.bias, backend=backend), target)

    losses, step = [], torch.compile(loss, backend="aot_eager") if compiled else loss
    for _ in range(20):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
        with torch.no_grad():
            losses.append(loss().item())
    return losses, layer.values.detach()


@pytest.mark.parametrize(("autocast", "compiled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("backend", ["gathered", "dense"])
def test_fused_optimizers_leave_nothing_stale(backend: str, autocast: bool, compiled: bool) -> None:
    """torch does not count their steps as changes."""
    tolerance = 2e-2 if autocast else 1e-4
    found, expected = optimized(backend, autocast, compiled), optimized("reference")
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert relative(found[1], expected[1]) < tolerance


@pytest.mark.parametrize("backend", ["gathered", "dense"])
def test_what_torch_does_not_count_is_forgotten_by_hand(backend: str) -> None:
    layer, x = layer_of(), torch.randn(5, 96)
    with torch.no_grad():
        before = linear(x, layer.weight, backend=backend)
        layer.values.data.mul_(2)
        forget(layer.weight)
        assert relative(linear(x, layer.weight, backend=backend), 2 * before) < 1e-6


@pytest.mark.parametrize("backend", ["gathered", "dense"])
def test_nothing_is_kept_of_inference_tensors(backend: str) -> None:
    """They have no count of changes."""
    with torch.inference_mode():
        layer, x = layer_of(), torch.randn(5, 96)
        before = linear(x, layer.weight, backend=backend)
        layer.values.mul_(2)
        assert relative(linear(x, layer.weight, backend=backend), 2 * before) < 1e-6


def test_indices_follow_changes_of_the_rows() -> None:
    cols = torch.tensor([0, 1]).int()
    matrix = BlockSparseMatrix(torch.ones(2, 2, 2), torch.tensor([0, 1, 2]).int(), cols, (4, 4))
    assert matrix.places == [(0, 0), (1, 1)]
    matrix.row_ptr[1] = 2
    assert matrix.places == [(0, 0), (0, 1)]
    assert matrix.by_row.ptr.tolist() == [0, 2, 2]


@pytest.mark.parametrize("backend", ["strided", "gathered", "batched", "dense", "reference"])
def test_training_without_tokens(backend: str) -> None:
    layer, x = layer_of(), torch.randn(0, 96, requires_grad=True)
    scale = torch.ones(64, requires_grad=True)
    linear(x, layer.weight, layer.bias, "gelu", backend=backend, scale=scale).sum().backward()
    assert x.grad.shape == (0, 96)
    assert all(t.grad.abs().sum() == 0 for t in (layer.values, layer.bias, scale))


def test_forward_mode_is_refused_rather_than_lost() -> None:
    layer, x = layer_of(), torch.randn(5, 96)
    with pytest.raises(NotImplementedError, match='no forward-mode derivative: use backend="reference"'):
        torch.func.jvp(lambda x: linear(x, layer.weight), (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: linear(x, layer.weight.with_values(v)), (layer.values,), (layer.values,))
    _, tangent = torch.func.jvp(lambda x: linear(x, layer.weight, backend="reference"), (x,), (x,))
    assert relative(tangent, linear(x, layer.weight)) < 1e-6


@pytest.mark.parametrize("trained", [True, False])
def test_the_preactivation_is_saved_for_gradients_only(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    saved, forward = [], backends.forward
    monkeypatch.setattr(backends, "forward", lambda *a: (saved.append(a[6]), forward(*a))[1])
    layer = layer_of().requires_grad_(trained)
    linear(torch.randn(5, 96), layer.weight, layer.bias, "gelu")
    assert saved == [trained]
