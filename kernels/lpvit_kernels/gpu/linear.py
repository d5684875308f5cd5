"""Launching the kernels: the forward product with its epilogue, and the gradients of its parts.

All tensors are on one GPU, or on the CPU under Triton's interpreter. Arguments are not checked here: lpvit_kernels.linear does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lpvit_kernels.gpu import configs
from lpvit_kernels.gpu.configs import Config, Kind
from lpvit_kernels.gpu.epilogue import epilogue_gradient as epilogue_gradient_kernel
from lpvit_kernels.gpu.matmul import matmul as matmul_kernel
from lpvit_kernels.gpu.weight_gradient import weight_gradient as weight_gradient_kernel
from lpvit_kernels.matrix import BlockSparseMatrix, View

Activation = Literal["gelu"] | None

EPILOGUE_TILE = (16, 128)  # tokens x features that a step of the epilogue's gradient holds
EPILOGUE_STEPS = 16


def forward(
    x: Tensor,
    weight: BlockSparseMatrix,
    bias: Tensor | None = None,
    activation: Activation = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    config: Config | None = None,
    save_preactivation: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y = act(x W^T + b) * scale + residual, and x W^T + b if `save_preactivation`.

    x [tokens, in]; bias, scale [out]; residual, y and the pre-activation [tokens, out]; all of x's type. Sums are float32.
    """
    y = x.new_empty(len(x), weight.shape[0])
    preactivation = torch.empty_like(y) if save_preactivation else None
    bias, scale, residual = _contiguous(bias), _contiguous(scale), _contiguous(residual)
    _matmul("forward", x, weight, weight.by_row, y, preactivation, bias, scale, residual, activation, config)
    return y, preactivation


def input_gradient(dy: Tensor, weight: BlockSparseMatrix, config: Config | None = None) -> Tensor:
    """dx = dy W [tokens, in], from the gradient dy [tokens, out] of x W^T."""
    dx = dy.new_empty(len(dy), weight.shape[1])
    _matmul("input_gradient", dy, weight, weight.by_column, dx, None, None, None, None, None, config)
    return dx


def weight_gradient(dy: Tensor, x: Tensor, weight: BlockSparseMatrix, config: Config | None = None) -> Tensor:
    """dvalues [nnz, R, C], from the gradient dy [tokens, out] of x W^T, and x; zero in the padding of ragged blocks.

    With `splits` > 1 it holds that many float32 copies of the values for a moment, which is worth it, and by default happens,
    only where blocks are few. The result does not depend on timing.
    """
    (out, features), (height, width), nnz = weight.shape, weight.block, len(weight.values)
    tokens = len(x)
    if nnz == 0 or tokens == 0:
        return torch.zeros_like(weight.values)
    if config is None:
        config = configs.default(
            "weight_gradient", x.dtype, weight.block, tokens, _capability(x.device), configs.precision(x.dtype)
        )
        config = replace(config, splits=configs.splits(-(-nnz // config.tile), tokens, config, _processors(x.device)))
    dy, x = _rows(dy), _rows(x)
    row_ptr, cols = weight.row_ptr.contiguous(), weight.cols.contiguous()
    steps = -(-tokens // (config.step * config.splits))
    dtype = x.dtype if config.splits == 1 else torch.float32
    parts = torch.empty(config.splits, nnz, height, width, dtype=dtype, device=x.device)
    grid = (-(-weight.grid[1] // config.tile), weight.grid[0], config.splits)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[grid](
            dy,
            x,
            parts,
            row_ptr,
            cols,
            tokens,
            out,
            features,
            nnz,
            dy.stride(0),
            x.stride(0),
            steps,
            R=height,
            C=width,
            PER=config.tile,
            STEP=config.step,
            PRECISION=configs.precision(x.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )
    return parts[0] if config.splits == 1 else parts.sum(dim=0).to(x.dtype)


def epilogue_gradient(
    dy: Tensor,
    preactivation: Tensor | None,
    activation: Activation,
    scale: Tensor | None,
    need_bias: bool = True,
    need_scale: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of z, b and scale, from that of y = act(z) * scale + residual with z = x W^T + b (the residual's is dy).

    dy, preactivation z, dz [tokens, out]; scale, dbias, dscale [out]. z may be None where there is neither an activation nor
    `need_scale`. dz is dy itself where nothing changes it.
    """
    tokens, out = dy.shape
    changes = activation is not None or scale is not None
    if not (changes or need_bias or need_scale):
        return dy, None, None
    dy, preactivation, scale = dy.contiguous(), _contiguous(preactivation), _contiguous(scale)
    dz = torch.empty_like(dy) if changes else None
    chunks = -(-tokens // (EPILOGUE_TILE[0] * EPILOGUE_STEPS))
    dbias = dy.new_empty(chunks, out, dtype=torch.float32) if need_bias else None
    dscale = dy.new_empty(chunks, out, dtype=torch.float32) if need_scale else None
    if tokens:
        with torch.cuda.device_of(dy):
            epilogue_gradient_kernel[(-(-out // EPILOGUE_TILE[1]), chunks)](
                dy,
                preactivation,
                scale,
                dz,
                dbias,
                dscale,
                tokens,
                out,
                ACTIVATION=activation,
                STEP=EPILOGUE_TILE[0],
                TILE=EPILOGUE_TILE[1],
                STEPS=EPILOGUE_STEPS,
            )
    return dy if dz is None else dz, _summed(dbias, dy.dtype), _summed(dscale, dy.dtype)


def _matmul(
    kind: Kind,
    x: Tensor,
    weight: BlockSparseMatrix,
    view: View,
    y: Tensor,
    preactivation: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    config: Config | None,
) -> None:
    tokens, features = x.shape
    if tokens == 0:
        return
    if config is None:
        config = configs.default(kind, x.dtype, weight.block, tokens, _capability(x.device), configs.precision(x.dtype))
    height, width = weight.block
    transposed = kind == "input_gradient"
    block_k, block_n = (height, width) if transposed else (width, height)
    x, source, values = _rows(x), None, weight.values.contiguous()
    descriptors = config.descriptors and _describable(x, values, block_k, config.step)
    if descriptors:
        box = [config.step, block_n] if transposed else [block_n, config.step]
        source = TensorDescriptor.from_tensor(x, [config.tile, config.step])
        values = TensorDescriptor.from_tensor(values.view(-1, width), box)
    grid = (-(-tokens // config.tile) * len(view.order),)
    with torch.cuda.device_of(x):
        matmul_kernel[grid](
            source if descriptors else x,
            values,
            y,
            preactivation,
            bias,
            scale,
            residual,
            view.ptr,
            view.across,
            view.place,
            view.order,
            tokens,
            features,
            y.shape[1],
            x.stride(0),
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            TRANSPOSED=transposed,
            RAGGED=features % block_k != 0,
            TILE=config.tile,
            STEP=config.step,
            DESCRIPTORS=descriptors,
            ACTIVATION=activation,
            PRECISION=configs.precision(x.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=config.registers,
        )


def _summed(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parts is None else parts.sum(dim=0).to(dtype)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _describable(x: Tensor, values: Tensor, block_k: int, step: int) -> bool:
    """Whether tensor descriptors can stand for x and the values: aligned to 16 bytes, whole blocks, no gathering, not empty."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(-2) * t.element_size() % 16 == 0 for t in (x, values))
    return aligned and x.shape[1] % block_k == 0 and step <= block_k and len(values) > 0


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; under the interpreter, of a GPU that has everything."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
