"""The distinct layers of a model, timed one by one, dense and block-sparse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from lpvit_kernels import tune
from torch import nn

from lpvit_cli.bench.work import work_of
from lpvit_cli.devices import describe_device, type_name
from lpvit_cli.machine import provenance
from lpvit_cli.measure.energy.run import EnergyRun, energy_on
from lpvit_cli.measure.profile import KEPT, DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.measure.timing import Subject, TimingRun, cpu_threads, time_interleaved
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.layers import require_called
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.blocks import Block, grid, require_fit
from lpvit_cli.recipe.measure import EnergySection
from lpvit_cli.sparse import BlockSparseLinear

WARMUP_SECONDS = 0.1  # for each of some thirty subjects
TRIALS = 3  # windows of energy for each: medians are asked for, no intervals
MODEL = "model"


@dataclass(frozen=True)
class LayerKind:
    """nn.Linear modules that cost the same."""

    shape: tuple[int, int]  # out, in
    rows: int  # of x per call
    bias: bool
    names: list[str]

    def subject(self, block: Block | None = None, kept_blocks: int = 0) -> str:
        """What this layer is called among the subjects of a measurement; without a block, as nn.Linear."""
        return f"{self.names[0]} {block} {kept_blocks}" if block else f"{self.names[0]} dense"


def measure_profile(
    model: VisionModel,
    linears: dict[str, nn.Linear],
    blocks: tuple[Block, ...],
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    threads: int | None,
    batch_size: int,
    rounds: int,
    energy: EnergySection,
    progress: Progress,
) -> tuple[DeviceProfile, list[str]]:
    """What the whole model and each distinct layer of `linears` take on a device, for a batch; and what makes that doubtful."""
    layers = distinct_layers(model, linears, blocks, batch_size)
    images = torch.randn(batch_size, *model.pretrained_cfg["input_size"]).to(device, dtype)
    subjects: dict[str, Subject] = {MODEL: partial(model.to(device, dtype), images)}
    with cpu_threads(threads), torch.inference_mode():
        for layer in layers:
            subjects |= _subjects(layer, blocks, device, dtype)
        timing = time_interleaved(
            subjects,
            device=device,
            rounds=rounds,
            warmup_seconds=WARMUP_SECONDS,
            on_round=lambda done, total: progress("timing the layers", done, total, f"round {done}/{total}"),
        )
        measured, reasons = energy_on(
            device,
            subjects,
            images_per_call=1,  # joules per call, whatever it holds
            trials=TRIALS,
            window_s=energy.window_seconds,
            allow_mig=energy.allow_mig,
            on_trial=lambda done, total: progress("energy of the layers", done, total, f"trial {done}/{total}"),
        )
        ms = {subject: timed.median_ms for subject, timed in timing.subjects.items()}
        mj = _millijoules(measured)
        profile = DeviceProfile(
            device=describe_device(device),
            dtype=type_name(dtype),
            threads=timing.threads,
            model=name,
            batch_size=batch_size,
            provenance=provenance("lpvit", "torch", "timm", "triton"),
            model_ms=ms[MODEL],
            model_mj=mj.get(MODEL),
            model_work=work_of(model, images),
            energy_source=measured.source if measured and mj else None,
            energy_reasons=reasons,
            layers=[_layer_profile(layer, blocks, ms, mj) for layer in layers],
        )
    return profile, advice(timing, profile)


def distinct_layers(
    model: VisionModel, linears: dict[str, nn.Linear], blocks: tuple[Block, ...], batch_size: int
) -> list[LayerKind]:
    """Layers of the model by shape, rows of x for a batch, and bias. Raises UsageError where a block is larger than one."""
    tokens = count_flops(model, linears).tokens
    require_called(linears, tokens)
    alike: dict[tuple[tuple[int, int], int], list[str]] = {}
    for name, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        for block in blocks:
            require_fit(name, shape, block)
        alike.setdefault((shape, tokens[name] * batch_size), []).append(name)
    return [
        LayerKind(shape, rows, any(linears[name].bias is not None for name in names), names)
        for (shape, rows), names in alike.items()
    ]


def kept_counts(shape: tuple[int, int], block: Block) -> list[int]:
    """How many blocks are kept at each measured fraction: ascending, at least one, each once."""
    rows, columns = grid(shape, block)
    return sorted({max(1, round(fraction * rows * columns)) for fraction in KEPT})


def _subjects(layer: LayerKind, blocks: tuple[Block, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Subject]:
    """The layer as nn.Linear, and as block-sparse with random blocks kept, all on the same random x [rows, in]."""
    out, columns = layer.shape
    x = torch.randn(layer.rows, columns).to(device, dtype)
    dense = nn.Linear(columns, out, bias=layer.bias).requires_grad_(False)
    made: dict[str, Subject] = {}
    for block in blocks:
        places = grid(layer.shape, block)
        for count in kept_counts(layer.shape, block):
            mask = (torch.randperm(places[0] * places[1]) < count).reshape(places)
            sparse = BlockSparseLinear.from_linear(dense, block, mask).to(device, dtype)
            tune(sparse.weight, layer.rows, ("forward",))  # no model would run it slower
            made[layer.subject(block, count)] = partial(sparse, x)
    return {layer.subject(): partial(dense.to(device, dtype), x), **made}


def _millijoules(energy: EnergyRun | None) -> dict[str, float]:
    """Of one call of each subject; empty when not measured."""
    return {name: 1000 * one.joules_per_image for name, one in energy.subjects.items()} if energy else {}


def _layer_profile(layer: LayerKind, blocks: tuple[Block, ...], ms: dict[str, float], mj: dict[str, float]) -> LayerProfile:
    sparse = []
    for block in blocks:
        places = grid(layer.shape, block)
        counts = kept_counts(layer.shape, block)
        names = [layer.subject(block, count) for count in counts]
        sparse.append(
            SparseProfile(
                block=block,
                kept=[count / (places[0] * places[1]) for count in counts],
                ms=[ms[name] for name in names],
                mj=[mj[name] for name in names] if mj else None,
            )
        )
    return LayerProfile(
        shape=layer.shape,
        rows=layer.rows,
        bias=layer.bias,
        names=layer.names,
        dense_ms=ms[layer.subject()],
        dense_mj=mj.get(layer.subject()),
        sparse=sparse,
    )


def advice(timing: TimingRun, profile: DeviceProfile) -> list[str]:
    """What makes these numbers doubtful."""
    notes = []
    if timing.busy:
        notes.append(f"other processes used {timing.foreign_load:.0%} of the machine: profile again when it is quiet")
    host_bound = sum(timed.host_bound for timed in timing.subjects.values())
    if host_bound:
        notes.append(
            f"{host_bound} of {len(timing.subjects)} times are the host's, which cannot feed the device fast enough: "
            "try a larger batch"
        )
    if profile.rest_ms == 0:
        notes.append("the layers one by one take longer than the whole model: predictions for a model will be too slow")
    return notes
