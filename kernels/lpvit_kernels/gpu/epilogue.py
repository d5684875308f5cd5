"""What happens to a product before it is stored: bias, GELU, LayerScale, residual; and the gradient of all that."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_cdf(z, EXACT: tl.constexpr):
    """Phi(z) in float32. Not EXACT: 0.5 + z times a polynomial of degree 6 in z^2, from |z| = 4 on exactly 0 or 1.

    z Phi(z) is then wrong by 1.9e-4 at most, at a third of the instructions of erf: too much for float32, less than bfloat16
    and float16 lose by rounding. The coefficients are a minimax fit of z Phi(z) (tests/kernels/gpu checks it) times 1.000004,
    so that the value at 4, however rounded, is outside of 0 to 1, and clamped to it. (A choice by z costs registers.)
    """
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
    else:
        z = tl.minimum(tl.maximum(z, -4.0), 4.0)
        u = z * z
        p = 2.25892315808e-08 * u - 1.58888768781e-06
        p = p * u + 4.77653212086e-05
        p = p * u - 0.000812205009516
        p = p * u + 0.00876381028455
        p = p * u - 0.0645549122804
        p = p * u + 0.397872102299
        cdf = tl.minimum(tl.maximum(0.5 + z * p, 0.0), 1.0)
    return cdf


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    return z * normal_cdf(z, EXACT)


@triton.jit
def gelu_gradient(z, EXACT: tl.constexpr):
    """d gelu / dz = Phi(z) + z phi(z)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return normal_cdf(z, EXACT) + z * density


@triton.jit
def store_result(
    acc,
    y,
    preactivation,
    bias,
    scale,
    residual,
    tile,
    line,
    tokens,
    out,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = act(acc + bias) * scale + residual and, where asked for, the pre-activation acc + bias.

    acc float32 [TILE, BLOCK_N], of tile number `tile` along tokens and `line` along features; bias, scale [out]; residual, y,
    preactivation [tokens, out] contiguous; bias, scale, residual and preactivation may be None.
    """
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    row = tl.arange(0, TILE)
    n = line * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < tokens - tile * TILE)[:, None] & (n < out)[None, :]
    base = tile.to(tl.int64) * TILE * out  # tokens x features may exceed 2^31
    at = row[:, None] * out + n[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    if preactivation is not None:
        tl.store(preactivation + base + at, acc.to(preactivation.dtype.element_ty), mask=inside)
    if ACTIVATION == "gelu":
        acc = gelu(acc, EXACT)
    if scale is not None:
        acc *= tl.load(scale + n, mask=n < out, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += tl.load(residual + base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + base + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def epilogue_gradient(
    dy,
    preactivation,
    scale,
    dz,
    dbias,
    dscale,
    tokens,
    out,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """dz = dy * scale * act'(z), and the sums of dz and of dy * act(z) over the STEP x STEPS tokens of this program.

    dy, preactivation z, dz [tokens, out] contiguous; scale [out]; dbias, dscale float32 [programs along tokens, out]: partial
    sums, added up afterwards in a fixed order, so that the result does not depend on timing. Each may be None.
    """
    EXACT: tl.constexpr = dy.dtype.element_ty == tl.float32
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    chunk = tl.program_id(1)
    factor = tl.full((TILE,), 1.0, tl.float32)
    if scale is not None:
        factor = tl.load(scale + n, mask=n < out, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((TILE,), tl.float32)
    scale_sum = tl.zeros((TILE,), tl.float32)
    for step in range(STEPS):
        m = (chunk * STEPS + step) * STEP + tl.arange(0, STEP)
        inside = (m < tokens)[:, None] & (n < out)[None, :]
        at = m.to(tl.int64)[:, None] * out + n[None, :]
        gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        activated = gradient
        if preactivation is not None:
            z = tl.load(preactivation + at, mask=inside, other=0.0).to(tl.float32)
            activated = z
            if ACTIVATION == "gelu":
                activated = gelu(z, EXACT)
        if dscale is not None:
            scale_sum += tl.sum(gradient * activated, axis=0)
        gradient *= factor[None, :]
        if ACTIVATION == "gelu":
            gradient *= gelu_gradient(z, EXACT)
        if dz is not None:
            tl.store(dz + at, gradient.to(dz.dtype.element_ty), mask=inside)
        bias_sum += tl.sum(gradient, axis=0)
    if dbias is not None:
        tl.store(dbias + chunk * out + n, bias_sum, mask=n < out)
    if dscale is not None:
        tl.store(dscale + chunk * out + n, scale_sum, mask=n < out)
