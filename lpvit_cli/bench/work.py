"""What a call of a model executes."""

from __future__ import annotations

from torch import Tensor

from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.layers import moved_bytes
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.targets.tuning import run_dense


def work_of(model: VisionModel, images: Tensor) -> Work:
    """What a call of a dense or block-sparse model on images [n, 3, H, W] executes, as its layers run on their device."""
    layers = sparse_layers(model)
    flops = count_flops(model, layers)
    macs, moved = len(images) * flops.total // 2, moved_bytes(model, images)
    for name in run_dense(model, len(images)):
        removed = layers[name].in_features * layers[name].out_features - layers[name].values.numel()
        macs += len(images) * flops.tokens[name] * removed
        moved += removed * images.element_size()
    return Work(macs, moved)
