"""lpvit from Python: prune, recover and export any module of linear layers, without a recipe or a run folder.

What the stages call, with plain arguments. Images are tensors [n, C, H, W], or whatever the model takes: one tensor, or any
iterable of batches, tensors or pairs of (images, labels).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lpvit_cli.curvature import collect
from lpvit_cli.data.batches import ListedBatches
from lpvit_cli.devices import pick_device
from lpvit_cli.errors import CheckFailed, UsageError, require
from lpvit_cli.files import fresh
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models import merging
from lpvit_cli.models.layers import own_layers
from lpvit_cli.progress import Progress, silent
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.plan import build_plan
from lpvit_cli.recipe.errors import explain
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recipe.prune import Block, PruneSection
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.recovery.lora import merge
from lpvit_cli.recovery.objective import Following
from lpvit_cli.recovery.recover import recover as run_recovery
from lpvit_cli.registry import BUDGETS
from lpvit_cli.sparse.masks import block_masks, require_same_masks
from lpvit_cli.tasks.base import Task
from lpvit_cli.tasks.classification import Classification
from lpvit_cli.tasks.features import Features
from lpvit_cli.tokens.blocks import merging_of

FLIPS_OF = 32  # images, that files of models which merge tokens are judged by
BATCH = 32  # images at a time, where one tensor holds them all
TASKS: dict[str, type[Task]] = {"classification": Classification, "features": Features}
Images = Tensor | Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]]


def prune(
    model: nn.Module,
    images: Images,
    *,
    block: Block | Sequence[Block] = (64, 32),
    layers: str | Sequence[str] = (),
    task: str = "classification",
    gradient: str | None = None,
    device: str = "auto",
    seed: int = 0,
    profile: DeviceProfile | str | Path | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> nn.Module:
    """A pruned copy of `model`, on the CPU in eval mode; `model` stays as it is.

    `images`: calibration images, a few hundred, held in memory. `settings`: one budget (`sparsity=0.5`, `flops=0.5`, or with a
    device `profile` `latency_ms`, `energy_mj`) and keys of a recipe's prune section (`method`, `patterns`, `beta` ...).
    `block`: output x input features; of several, each layer takes one. `layers`: globs over module names; default: the blocks
    of a timm model, else all linear layers that the model calls but for one that gives its output. `task`: "classification"
    (outputs are logits) or "features". `gradient`, of classification: "sampled", "logits", or "empirical" (needs labels).

    Raises UsageError where arguments, layers or budget do not fit.
    """
    if gradient not in (None, "sampled", "logits", "empirical"):
        raise UsageError(f"gradient: there is none called {gradient!r}", "choose one of sampled, logits, empirical")
    batches = _batches(images, labelled=gradient == "empirical")
    dense = copy.deepcopy(model).cpu().eval()
    example = batches[0][0][:1]
    found = own_layers(dense, example, [layers] if isinstance(layers, str) else layers)
    options, where = _settings(settings, block, profile is not None), pick_device(device)
    judged, gradient = _task(task), gradient or "sampled"
    statistics = collect(
        dense,
        found,
        batches,
        judged.loss(gradient, seed),
        where,
        lambda done: progress("calibrating", done, 0, f"{done} images"),
        height=options.height,
    )
    dense.cpu()
    plan = build_plan(
        options,
        dense,
        found,
        {name: layer.to(torch.device("cpu")) for name, layer in statistics.items()},
        batches,
        example=example,
        task=judged,
        gradient=gradient,
        seed=seed,
        device=where,
        progress=progress,
        profile=profile if isinstance(profile, DeviceProfile) or profile is None else DeviceProfile.load(profile),
    )
    pruned, _ = prune_model(plan, options.budget, progress)
    return pruned.requires_grad_(True).eval()


def recover(
    model: nn.Module,
    teacher: nn.Module,
    images: Images,
    *,
    epochs: int = 3,
    task: str = "classification",
    held_back: float = 0.1,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
    **settings: Any,
) -> nn.Module:
    """A copy of a pruned `model` whose kept blocks were trained to follow `teacher`, on the CPU in eval mode; no labels needed.

    `images`: of training, held in memory; the share `held_back` of their batches judges the epochs, and the best one is
    returned, `model` itself if none is better. `settings`: keys of a recipe's finetune section (`method`: lora_ga, lora or
    full; `rank`, `lr`, `warmup_epochs`, `also_train` ...), but for those of labelled images. Every removed block stays removed.

    Raises UsageError where arguments do not fit, CheckFailed where training diverges.
    """
    if labelled := sorted({"distill", "augment", "label_smoothing", "target_top1"} & settings.keys()):
        raise UsageError(
            f"recover: {labelled[0]} has no meaning here: the model follows its teacher on images as they are", "leave it out"
        )
    batches, where, judged = _batches(images), pick_device(device), _task(task)
    options = _finetune({**settings, "epochs": epochs, "distill": None})
    kept = min(len(batches) - 1, max(1, round(held_back * len(batches)))) if len(batches) > 1 else 0
    train, judging = batches[kept:], batches[:kept] or batches
    student, parent = copy.deepcopy(model).to(where).eval(), copy.deepcopy(teacher).to(where).eval().requires_grad_(False)
    masks = block_masks(student)
    if not masks:
        raise UsageError(
            "recover: no layer of this model is block-sparse", "prune it first: lpvit_cli.prune(model, images, ...)"
        )
    reference = judged.outputs(parent, judging, where)

    def closeness() -> Closeness:
        return Closeness(judged.divergence(judged.outputs(student, judging, where), reference))

    shuffled = ListedBatches(train, seed)
    following = Following(parent, judged.distillation)
    run_recovery(
        student, options, shuffled, shuffled, following, closeness, closeness(), seed=seed, device=where, progress=progress
    )
    merge(student)
    require_same_masks(masks, block_masks(student))
    return student.cpu().requires_grad_(True).eval()


def merge_tokens(
    model: nn.Module, *, flops: float | None = None, fraction: float | None = None, after: Sequence[int] | None = None
) -> nn.Module:
    """A copy of a dense `model` (of timm, or from `load_model`) that merges similar tokens between its blocks.

    So much that it needs `flops` of its FLOPs, or a `fraction` of the tokens each time; `after`: the blocks after which, the
    first is 0; default: every second one. Prune and export the copy as any model; recover it with the dense model for teacher.
    Raises UsageError where it cannot merge, or not so much.
    """
    try:
        wanted = TokensSection(flops=flops, fraction=fraction, after=None if after is None else tuple(after))
    except ValidationError as error:
        raise UsageError(
            f"merge_tokens: {error.errors()[0]['msg'].removeprefix('Value error, ')}",
            "for example: merge_tokens(model, flops=0.7)",
        ) from error
    dense: Any = model
    return merging.merge_tokens(dense, merging.merging_for(dense, wanted))


@dataclass(frozen=True)
class Closeness:
    """How near a model is to its teacher."""

    divergence: float

    @property
    def score(self) -> tuple[float]:
        return (-self.divergence,)


@dataclass(frozen=True)
class OnnxFile:
    """What `export_onnx` wrote: the form of each block-sparse layer, and ||file - model|| / ||model|| of the outputs."""

    path: Path
    forms: dict[str, str]
    relative_error: float
    bytes: int


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | Path,
    *,
    form: str = "auto",
    precision: str = "float32",
    opset: int = 20,
    threads: int = 1,
    tolerance: float | None = None,
    progress: Progress = silent,
) -> OnnxFile:
    """Write `model`, block-sparse layers and all, as an ONNX file that a stock onnxruntime runs; `example`: an input [n, ...].

    `form`: how block-sparse layers are written; auto times the forms here with `threads` on inputs like `example`, and takes
    the fastest. `precision`: float32, float16, bfloat16 (in opset 22 at least) or int8. What was written is run and compared
    with the model on `example`. Raises CheckFailed, and leaves no file, where they differ by more than `tolerance` (default: by
    precision); EnvironmentFault without onnx, onnxscript and onnxruntime.
    """
    require("onnx", "onnxscript", "onnxruntime")
    from lpvit_cli.export.check import MOST_FLIPPED, parity_of_merging, relative_error
    from lpvit_cli.export.choose import choose_forms
    from lpvit_cli.export.forms import FORMS, forms_of
    from lpvit_cli.export.graph import HALF, as_float32, save_onnx
    from lpvit_cli.export.layer import FormChoice
    from lpvit_cli.export.onnx_file import exported_layers, sparse_graph
    from lpvit_cli.export.source import TOLERANCES
    from lpvit_cli.sparse import layer_tokens
    from lpvit_cli.targets.onnxruntime import session

    if precision not in TOLERANCES or precision == "int8-static" or form not in ("auto", *FORMS):
        raise UsageError(
            f"export_onnx: form {form!r}, precision {precision!r}: not both known",
            f"forms: auto, {', '.join(FORMS)}; precisions: float32, float16, bfloat16, int8",
        )
    model, path = copy.deepcopy(model).cpu().eval(), Path(path)
    if not path.parent.is_dir():
        raise UsageError(f"export_onnx: {path.parent}: no such folder", "make it, or choose another path")
    opset = max(opset, 22) if precision == "bfloat16" else opset
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    layers = exported_layers(model, precision, form, lambda name: False)
    tokens = {name: len(example) * rows for name, rows in layer_tokens(model, layers, example).items()}
    if form == "auto" and precision not in HALF:
        choices = choose_forms(layers, tokens, threads, progress)
    else:
        asked = "dense" if form == "auto" else form
        choices = {name: FormChoice(asked if asked in forms_of(layer) else "dense", {}) for name, layer in layers.items()}
    graph = sparse_graph(model, layers, choices, opset, precision, example)
    partial, apart = fresh(path, "partial"), fresh(path, "checked")
    try:
        save_onnx(graph, partial, {})
        size = partial.stat().st_size
        checked = partial
        if precision == "bfloat16":  # which onnxruntime's CPU provider does not have
            checked = apart
            as_float32(graph)
            save_onnx(graph, checked, {})
        merges, judged = merging_of(model) is not None, example.float().cpu()
        if merges:  # near ties may fall otherwise in one image: the median of many counts
            more = torch.randn(max(0, FLIPS_OF - len(judged)), *judged.shape[1:], generator=torch.Generator().manual_seed(0))
            judged = torch.cat([judged, judged.mean() + judged.std(correction=0) * more])
        with torch.no_grad():
            reference = model(judged)
        written = torch.from_numpy(session(checked, threads).run(None, {"images": judged.numpy()})[0])
        parity = parity_of_merging(written, reference, tolerance, classes=False) if merges else None
        error = parity.relative_error if parity else relative_error(written, reference)
        if not error <= tolerance or (parity and (parity.flipped or 0) > MOST_FLIPPED):
            raise CheckFailed(
                f"export_onnx: {path} differs from the model by {error:.1e}, more than {tolerance:g}",
                "try form='dense', another opset or precision; nothing was written",
            )
        partial.replace(path)
    finally:
        for left in (partial, apart):
            left.unlink(missing_ok=True)
    return OnnxFile(path, {name: choice.form for name, choice in choices.items()}, error, size)


def _batches(images: Images, labelled: bool = False) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) in batches; labels of no meaning where there are none, unless they are needed."""
    if isinstance(images, tuple) and len(images) == 2 and isinstance(images[1], Tensor) and images[1].ndim < 2:
        raise UsageError("images: a pair (images, labels) alone is no iterable of batches", "give a list: [(images, labels)]")
    given: list[Any] = list(images.split(BATCH)) if isinstance(images, Tensor) else list(images)
    if not given:
        raise UsageError("images: there are none", "give a tensor [n, C, H, W], or an iterable of them")
    if labelled and not all(isinstance(one, tuple | list) for one in given):
        raise UsageError("gradient: 'empirical' needs labels", "give pairs (images, labels), or gradient='sampled'")
    pairs = [one if isinstance(one, tuple | list) else (one, torch.zeros(len(one), dtype=torch.int64)) for one in given]
    return [(batch.cpu(), labels.cpu()) for batch, labels in pairs]


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UsageError(f"task: there is none called {name!r}", f"choose one of {', '.join(TASKS)}")
    return TASKS[name]()


def _finetune(settings: dict[str, Any]) -> FinetuneSection:
    """The finetune section that keyword arguments say."""
    try:
        return FinetuneSection.model_validate(settings)
    except ValidationError as error:
        raise explain(error, FinetuneSection, settings, {}, Path("lpvit_cli.recover")) from None


def _settings(settings: dict[str, Any], block: Any, profiled: bool) -> PruneSection:
    """The prune section that keyword arguments say; budgets are named by their kind."""
    budget = {kind: settings.pop(kind) for kind in BUDGETS.names() if kind in settings}
    if len(budget) != 1 or "budget" in settings:
        raise UsageError(
            "prune: give exactly one budget as an argument", f"sparsity=0.5, or one of {', '.join(BUDGETS.names())}"
        )
    content = {**settings, "block": block, "budget": budget}
    try:
        made = PruneSection.model_validate(content)
    except ValidationError as error:
        raise explain(error, PruneSection, content, {}, Path("lpvit_cli.prune")) from None
    if made.budget.is_searched:
        raise UsageError(f"prune: {made.budget.kind} needs images to evaluate on", "give sparsity= or flops=")
    if made.budget.needs_profile and not profiled:
        raise UsageError(f"prune: {made.budget.kind} needs a device profile", "give profile=, made by: lpvit profile RECIPE")
    return made
