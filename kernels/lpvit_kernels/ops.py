"""The public operations, as operators that torch knows: autograd, torch.compile, torch.export and flop counters see them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from lpvit_kernels import backends, reference
from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.memo import drop, memo


def linear(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None = None,
    activation: Literal["gelu"] | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """y = act(x W^T + b) [* scale] [+ residual]; x [..., in], bias and scale [out], residual and y [..., out].

    Differentiable in all of them and in the values of `weight`, whose gradient exists on kept blocks only. `backend`: "auto"
    takes what `tune` found fastest for this layer, number of tokens and device, dense included, and a rule of thumb where
    nothing was tuned; or one of `BACKENDS`. `activation`: "gelu" is the exact one, with erf (in half precision the GPU kernels
    take a polynomial within its rounding). Under autocast it computes in the autocast type, as F.linear does.

    Raises ValueError when shapes, types, devices or the backend do not fit, NotImplementedError under forward-mode
    differentiation (torch.func.jvp), which only the reference backend has.
    """
    if not isinstance(weight, BlockSparseMatrix):
        raise TypeError(f"weight must be a BlockSparseMatrix (its from_dense makes one), got {type(weight).__name__}")
    if x.ndim == 0:
        raise ValueError("x must be [..., in], got a single number")
    if x.device != weight.values.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.values.device}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x, weight, bias, scale, residual = _autocast(x, weight, bias, scale, residual)
    _check(x, weight, bias, activation, scale, residual, backend)
    if backend == "reference":
        return reference.linear(x, weight, bias, activation, scale, residual)
    given = [t for t in (x, weight.values, bias, scale, residual) if t is not None]
    _refuse_forward_mode(given)
    rows = None if residual is None else residual.reshape(-1, weight.shape[0])
    flat = x.reshape(-1, x.shape[-1])
    needs_z = activation is not None or (scale is not None and scale.requires_grad)
    needs_z = needs_z and torch.is_grad_enabled() and any(t.requires_grad for t in given)
    y, _ = torch.ops.lpvit.block_sparse_linear(
        flat, weight.values, bias, scale, rows, weight.row_ptr, weight.cols, weight.shape[0], activation, needs_z, backend
    )
    made: Tensor = y.reshape(*x.shape[:-1], weight.shape[0])
    return made


def kept_product(left: Tensor, right: Tensor, pattern: BlockSparseMatrix, backend: str = "auto") -> Tensor:
    """The blocks of left @ right that `pattern` keeps, and no others: values [nnz, R, C], zero in the padding of ragged edges.

    left [out, k], right [k, in], pattern [out, in]; of the pattern's values only their shape counts. Differentiable in both
    factors. Autocast does not apply: it computes in the type of the factors. `backend` as in `linear`.

    Raises ValueError when shapes, types, devices or the backend do not fit.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors must be [out, k] and [k, in], got {list(left.shape)} and {list(right.shape)}")
    if (left.shape[0], right.shape[1]) != pattern.shape:
        raise ValueError(f"the product is {[left.shape[0], right.shape[1]]}, the pattern {list(pattern.shape)}")
    if left.dtype != right.dtype or not left.device == right.device == pattern.cols.device:
        kinds = ", ".join(f"{t.dtype} on {t.device}" for t in (left, right, pattern.values))
        raise ValueError(f"factors must be of one type, and on the device of the pattern, got {kinds}")
    if backend not in backends.NAMES or (reason := backends.refusal(backend, left.device.type)):
        raise ValueError(reason if backend in backends.NAMES else f"unknown backend {backend!r}: use one of {backends.NAMES}")
    if backend == "reference":
        return BlockSparseMatrix.from_dense(left @ right, pattern.block, pattern.block_mask).values
    like = pattern.values.detach()
    with torch.autocast(left.device.type, enabled=False):
        values: Tensor = torch.ops.lpvit.block_sparse_kept_product(left.T, right, like, pattern.row_ptr, pattern.cols, backend)
    return values


def _autocast(
    x: Tensor, weight: BlockSparseMatrix, bias: Tensor | None, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, BlockSparseMatrix, Tensor | None, Tensor | None, Tensor | None]:
    dtype, values = torch.get_autocast_dtype(x.device.type), weight.values
    if values.dtype == dtype or torch.is_grad_enabled() or torch.compiler.is_compiling():
        if values.requires_grad and not torch.compiler.is_compiling():
            drop(values)  # the operator that computes their gradient sees the converted ones
        values = values.to(dtype)
    else:
        values = memo(values, f"as {dtype}", lambda: weight.values.to(dtype))
    others = [None if t is None else t.to(dtype) for t in (bias, scale, residual)]
    return x.to(dtype), weight.with_values(values), others[0], others[1], others[2]


def _refuse_forward_mode(tensors: list[Tensor]) -> None:
    """The operators would lose the tangents without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError('block-sparse linear layers have no forward-mode derivative: use backend="reference"')


def _check(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None,
    activation: str | None,
    scale: Tensor | None,
    residual: Tensor | None,
    backend: str,
) -> None:
    if backend not in backends.NAMES:
        raise ValueError(f"unknown backend {backend!r}: use one of {', '.join(backends.NAMES)}")
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {weight.shape[1]}")
    if not torch.compiler.is_compiling() and (reason := backends.refusal(backend, x.device.type)):
        raise ValueError(reason)
    out = (weight.shape[0],)
    for name, tensor, shape in (("bias", bias, out), ("scale", scale, out), ("residual", residual, (*x.shape[:-1], *out))):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    dtypes = {"weight": weight.values.dtype} | {
        name: t.dtype for name, t in (("bias", bias), ("scale", scale), ("residual", residual)) if t is not None
    }
    if other := [f"{name} {dtype}" for name, dtype in dtypes.items() if dtype != x.dtype]:
        raise ValueError(f"x is {x.dtype}, but {', '.join(other)}: convert to one type, or use autocast")


# the operators: the product with its epilogue, the two products of its backward pass, and the product of two dense factors

_LIBRARY = torch.library.Library("lpvit", "DEF")
_LIBRARY.define(
    "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor? scale, Tensor? residual, Tensor row_ptr, Tensor cols,"
    " SymInt out_features, str? activation, bool needs_z, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "block_sparse_epilogue_gradient(Tensor dy, Tensor z, Tensor? scale, str? activation, bool need_bias, bool need_scale,"
    " str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "block_sparse_input_gradient(Tensor dz, Tensor values, Tensor row_ptr, Tensor cols, SymInt in_features, str backend)"
    " -> Tensor"
)
_LIBRARY.define(
    "block_sparse_weight_gradient(Tensor dz, Tensor x, Tensor values, Tensor row_ptr, Tensor cols, str backend) -> Tensor"
)
_LIBRARY.define(
    "block_sparse_kept_product(Tensor left_t, Tensor right, Tensor values, Tensor row_ptr, Tensor cols, str backend) -> Tensor"
)


def _matrix(values: Tensor, row_ptr: Tensor, cols: Tensor, shape: tuple[int, int]) -> BlockSparseMatrix:
    return BlockSparseMatrix(values, row_ptr, cols, shape, check=False)


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    row_ptr: Tensor,
    cols: Tensor,
    out_features: int,
    activation: Literal["gelu"] | None,
    needs_z: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y, and with `needs_z` the pre-activation z = x W^T + b for the backward pass, else an empty tensor."""
    weight = _matrix(values, row_ptr, cols, (out_features, x.shape[1]))
    y, z = backends.forward(x, weight, bias, activation, scale, residual, needs_z, backend)
    return y, x.new_empty(0) if z is None else z


def _epilogue_gradient(
    dy: Tensor,
    z: Tensor,
    scale: Tensor | None,
    activation: Literal["gelu"] | None,
    need_bias: bool,
    need_scale: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for what is not needed, and for a dz that is dy: operators do not return their arguments."""
    made = backends.epilogue_gradient(dy, z if z.ndim == 2 else None, activation, scale, need_bias, need_scale, backend)
    dz, dbias, dscale = (dy.new_empty(0) if found is None or found is dy else found for found in made)
    return dz, dbias, dscale


def _input_gradient(dz: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor, in_features: int, backend: str) -> Tensor:
    return backends.input_gradient(dz, _matrix(values, row_ptr, cols, (dz.shape[1], in_features)), backend)


def _weight_gradient(dz: Tensor, x: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor, backend: str) -> Tensor:
    gradient = backends.weight_gradient(dz, x, _matrix(values, row_ptr, cols, (dz.shape[1], x.shape[1])), backend)
    drop(values)  # the step of an optimizer follows, which torch does not count if it is fused
    return gradient


def _kept_product(left_t: Tensor, right: Tensor, values: Tensor, row_ptr: Tensor, cols: Tensor, backend: str) -> Tensor:
    """The same product as the gradient of the weight, with k in the place of the tokens: left_t [k, out], right [k, in]."""
    pattern = _matrix(values, row_ptr, cols, (left_t.shape[1], right.shape[1]))
    return backends.weight_gradient(left_t, right, pattern, backend)


_LIBRARY.impl("block_sparse_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_epilogue_gradient", _epilogue_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_input_gradient", _input_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_weight_gradient", _weight_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("block_sparse_kept_product", _kept_product, "CompositeExplicitAutograd")


@torch.library.register_fake("lpvit::block_sparse_linear", lib=_LIBRARY)
def _(x, values, bias, scale, residual, row_ptr, cols, out_features, activation, needs_z, backend):  # type: ignore[no-untyped-def]
    y = x.new_empty(x.shape[0], out_features)
    return y, torch.empty_like(y) if needs_z else x.new_empty(0)


@torch.library.register_fake("lpvit::block_sparse_epilogue_gradient", lib=_LIBRARY)
def _(dy, z, scale, activation, need_bias, need_scale, backend):  # type: ignore[no-untyped-def]
    changes, sums = activation is not None or scale is not None, (need_bias, need_scale)
    return torch.empty_like(dy) if changes else dy.new_empty(0), *(dy.new_empty(dy.shape[1] if need else 0) for need in sums)


@torch.library.register_fake("lpvit::block_sparse_input_gradient", lib=_LIBRARY)
def _(dz, values, row_ptr, cols, in_features, backend):  # type: ignore[no-untyped-def]
    return dz.new_empty(dz.shape[0], in_features)


@torch.library.register_fake("lpvit::block_sparse_weight_gradient", lib=_LIBRARY)
def _(dz, x, values, row_ptr, cols, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(values)


@torch.library.register_fake("lpvit::block_sparse_kept_product", lib=_LIBRARY)
def _(left_t, right, values, row_ptr, cols, backend):  # type: ignore[no-untyped-def]
    return right.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, _, scale, _, row_ptr, cols, _, ctx.activation, _, ctx.backend = inputs
    ctx.save_for_backward(x, values, scale, row_ptr, cols, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, values, scale, row_ptr, cols, z = ctx.saved_tensors
    need_x, need_values, need_bias, need_scale, need_residual = ctx.needs_input_grad[:5]
    dz, dbias, dscale = torch.ops.lpvit.block_sparse_epilogue_gradient(
        dy.contiguous(), z, scale, ctx.activation, need_bias, need_scale, ctx.backend
    )
    if ctx.activation is None and scale is None:
        dz = dy.contiguous()
    dx = dvalues = None
    if need_x:
        dx = torch.ops.lpvit.block_sparse_input_gradient(dz, values, row_ptr, cols, x.shape[1], ctx.backend)
    if need_values:
        dvalues = torch.ops.lpvit.block_sparse_weight_gradient(dz, x, values, row_ptr, cols, ctx.backend)
    return (
        dx,
        dvalues,
        dbias if need_bias else None,
        dscale if need_scale else None,
        dy if need_residual else None,
        *(None,) * 6,
    )


torch.library.register_autograd("lpvit::block_sparse_linear", _backward, setup_context=_save, lib=_LIBRARY)


def _save_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    left_t, right, _, row_ptr, cols, ctx.backend = inputs
    ctx.save_for_backward(left_t, right, row_ptr, cols)


def _backward_of_factors(ctx: Any, dvalues: Tensor) -> tuple[Any, ...]:
    """With dW the block-sparse gradient of the product: d left_t = right dW^T, d right = left_t dW."""
    left_t, right, row_ptr, cols = ctx.saved_tensors
    gradient = _matrix(dvalues.contiguous(), row_ptr, cols, (left_t.shape[1], right.shape[1]))
    dleft_t = dright = None
    if ctx.needs_input_grad[0]:
        dleft_t, _ = torch.ops.lpvit.block_sparse_linear(
            right, gradient.values, None, None, None, row_ptr, cols, gradient.shape[0], None, False, ctx.backend
        )
    if ctx.needs_input_grad[1]:
        dright = torch.ops.lpvit.block_sparse_input_gradient(
            left_t.contiguous(), gradient.values, row_ptr, cols, gradient.shape[1], ctx.backend
        )
    return dleft_t, dright, None, None, None, None


torch.library.register_autograd(
    "lpvit::block_sparse_kept_product", _backward_of_factors, setup_context=_save_factors, lib=_LIBRARY
)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("block-sparse linear layers have no second derivative (once_differentiable)")


for _name in ("epilogue", "input", "weight"):
    torch.library.register_autograd(f"lpvit::block_sparse_{_name}_gradient", _no_second_derivative, lib=_LIBRARY)


@register_flop_formula(
    [
        torch.ops.lpvit.block_sparse_linear,
        torch.ops.lpvit.block_sparse_input_gradient,
    ]
)
def _product_flops(x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Multiplications and additions of kept blocks."""
    nnz, height, width = values_shape
    return 2 * int(x_shape[0]) * nnz * height * width


@register_flop_formula([torch.ops.lpvit.block_sparse_weight_gradient, torch.ops.lpvit.block_sparse_kept_product])
def _gradient_flops(dz_shape, x_shape, values_shape, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _product_flops(x_shape, values_shape)
