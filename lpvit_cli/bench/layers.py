"""bench --layers: where the time of the sparse model goes, layer by layer, beside the dense model's and the roofline."""

from __future__ import annotations

from statistics import median
from typing import cast

from lpvit_kernels import dispatch
from torch import Tensor, nn

from lpvit_cli.bench.results import LayerBench, LayersBench
from lpvit_cli.measure.layers import PASS, LayerWatch, Traffic, watch_in_turn
from lpvit_cli.measure.roofline import Ceilings
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.sparse import BlockSparseLinear


def bench_layers(models: dict[str, VisionModel], images: Tensor, rounds: int, progress: Progress) -> LayersBench:
    """`models` holds the dense and the sparse one; images [n, 3, H, W]."""
    ceilings = Ceilings.measure(images.device, images.dtype)
    layers = _linears(models["sparse"])
    sparse = LayerWatch(models["sparse"], layers, images)
    dense = LayerWatch(models["dense"], _linears(models["dense"]), images)
    what = f"timing the layers, batch {len(images)}"
    watch_in_turn([dense, sparse], rounds, lambda done, total: progress(what, done, total, f"round {done}/{total}"))
    ms, ms_dense = ({name: median(taken) for name, taken in watch.samples_ms.items()} for watch in (sparse, dense))
    return LayersBench(
        total_ms=ms[PASS],
        total_ms_dense=ms_dense[PASS],
        peak_tflops=ceilings.flops / 1e12,
        bandwidth_gb_s=ceilings.bandwidth / 1e9,
        layers=[
            _layer(name, layer, sparse.traffic[name], images, ms[name], ms_dense[name], ms[PASS], ceilings)
            for name, layer in layers.items()
            if name in sparse.traffic  # some models read a layer's weight without calling it
        ],
    )


def _layer(
    name: str,
    layer: nn.Linear | BlockSparseLinear,
    traffic: Traffic,
    images: Tensor,
    ms: float,
    ms_dense: float,
    total_ms: float,
    ceilings: Ceilings,
) -> LayerBench:
    weight = layer.weight if isinstance(layer, BlockSparseLinear) else None
    values = weight.values if weight else cast(nn.Linear, layer).weight
    flops = 2 * traffic.rows * values.numel()
    like = images.new_empty(traffic.rows, 1)
    return LayerBench(
        name=name,
        shape=(layer.out_features, layer.in_features),
        block=weight.block if weight else None,
        density=weight.density if weight else 1.0,
        rows=traffic.rows,
        runs=dispatch.choose("forward", "auto", like, weight).backend if weight else "linear",
        ms=ms,
        ms_dense=ms_dense,
        share=ms / total_ms,
        tflops=flops / ms / 1e9,
        roofline=ceilings.least_ms(flops, traffic.moved_bytes) / ms,
    )


def _linears(model: nn.Module) -> dict[str, nn.Linear | BlockSparseLinear]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | BlockSparseLinear)}
