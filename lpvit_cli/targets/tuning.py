"""Which backend runs each block-sparse layer fastest on this device."""

from __future__ import annotations

from collections.abc import Sequence

from lpvit_kernels import BlockSparseMatrix, dispatch, tune
from lpvit_kernels.dispatch import Kind
from pydantic import BaseModel

from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.sparse import layer_tokens, sparse_layers


class TunedLayers(BaseModel):
    """Layers that no choice of a backend can tell apart. Times are medians in microseconds, by backend."""

    layers: list[str]
    kind: str  # forward, input_gradient or weight_gradient
    shape: tuple[int, int]  # out, in
    block: tuple[int, int]
    density: float
    tokens: int
    choice: str
    times_us: dict[str, float]
    speedup: float | None  # dense time over the choice's; None: there is no dense form
    kept_tflops: float  # TFLOP/s on kept blocks


def tune_model(
    model: VisionModel, batch_sizes: Sequence[int], kinds: tuple[Kind, ...], progress: Progress, again: bool = True
) -> list[TunedLayers]:
    """Layers that a choice cannot tell apart are timed once; with `again` false, only those that were never timed here."""
    cases: dict[dispatch.Case, tuple[list[str], BlockSparseMatrix, int]] = {}
    for batch_size in batch_sizes:
        for name, tokens in layer_tokens(model).items():
            weight = sparse_layers(model)[name].weight
            like = weight.values.new_empty(batch_size * tokens, 1)
            for kind in kinds:
                case = dispatch.case(kind, like, weight)
                if again or not dispatch.tuned.find(case.key):
                    cases.setdefault(case, ([], weight, batch_size * tokens))[0].append(name)
    found = []
    for done, (case, (names, weight, tokens)) in enumerate(cases.items(), start=1):
        progress("tuning", done - 1, len(cases), f"{done}/{len(cases)}: {names[0]}, {tokens} tokens")
        best = tune(weight, tokens, (case.kind,))[case.kind]
        fastest = best.times_us[best.choice.backend]
        found.append(
            TunedLayers(
                layers=names,
                kind=case.kind,
                shape=case.shape,
                block=case.block,
                density=weight.density,
                tokens=tokens,
                choice=best.choice.backend,
                times_us=best.times_us,
                speedup=best.times_us["dense"] / fastest if "dense" in best.times_us else None,
                kept_tflops=2 * tokens * weight.values.numel() / fastest * 1e-6,
            )
        )
    progress("tuning", len(cases), len(cases), "done")
    return found


def run_dense(model: VisionModel, batch_size: int) -> list[str]:
    """The block-sparse layers that run as dense ones on batches of this size: faster here, tuned or by rule of thumb."""
    found = []
    for name, tokens in layer_tokens(model).items():
        weight = sparse_layers(model)[name].weight
        like = weight.values.new_empty(batch_size * tokens, 1)
        if weight.density < 1 and dispatch.choose("forward", "auto", like, weight).backend == "dense":
            found.append(name)
    return found
