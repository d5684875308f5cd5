"""Input second moments: H = 2/N sum x x^T, the Hessian of a layer's squared error (Optimal Brain Compression, arXiv 2208.11580)
and the input factor of K-FAC (arXiv 1503.05671)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_cli.curvature.statistics import LayerStatistics


def observe_inputs(layer: nn.Linear, into: LayerStatistics) -> RemovableHandle:
    """Add x^T x and the number of tokens of every call, x [tokens, in]."""

    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        into.A.addmm_(x.T, x)
        into.tokens += len(x)

    return layer.register_forward_pre_hook(observe)
