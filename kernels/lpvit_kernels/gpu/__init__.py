"""The block-sparse product and its gradients as Triton kernels, for NVIDIA GPUs of compute capability 8.0 and newer.

Importing this imports Triton; `import lpvit_kernels` does not.
"""

from lpvit_kernels.gpu.configs import Config, candidates, default, supports
from lpvit_kernels.gpu.linear import epilogue_gradient, forward, input_gradient, weight_gradient

__all__ = [
    "Config",
    "candidates",
    "default",
    "epilogue_gradient",
    "forward",
    "input_gradient",
    "supports",
    "weight_gradient",
]
