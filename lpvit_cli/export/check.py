"""Does an exported file compute what the model computes?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.data.batches import Batches
from lpvit_cli.errors import CheckFailed
from lpvit_cli.export.layer import ExportLayer, FormChoice
from lpvit_cli.export.results import ExportedLayer, Parity
from lpvit_cli.export.source import Source
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.tokens.blocks import merging_of

BATCH_SIZES = (1, 2, 7)
MORE = 22  # images, where tokens are merged
MOST_FLIPPED = 1 / 3  # of images whose near ties another runtime decides otherwise; a tenth is usual


def check(exported: VisionModel, source: Source, file: str) -> tuple[list[Parity], Any]:
    """`exported` against the model on real images, and its quality. Raises CheckFailed where they differ too much."""
    merges = merging_of(source.original) is not None
    sizes = [*BATCH_SIZES, MORE] if merges else list(BATCH_SIZES)
    with torch.inference_mode():
        batches = real_images(source.validation.images, sum(sizes)).split(sizes)
        pairs = [(exported(batch), source.original(batch)) for batch in batches]
    classes = bool(source.original.num_classes)
    if merges:
        parity = [_pooled(pairs, source.tolerance, classes, file)]
    else:
        parity = [parity_of(*pair, source.tolerance, classes) for pair in pairs]
    for result in parity:
        require_parity(result, source.tolerance, file)
    quality = source.validation.quality(exported, "evaluating the exported file")
    if quality.score[0] < source.least_score(source.quality):
        now, before = quality.figures[0], source.quality.figures[0]
        raise CheckFailed(
            f"export: {file} has {now.text} {now.name}, the model {before.text}: more than "
            f"export.max_drop = {source.settings.max_drop:g} points are lost",
            "another export.precision keeps more (int8-static, float32); nothing was written",
        )
    return parity, quality


def _pooled(pairs: list[tuple[Tensor, Tensor]], tolerance: float, classes: bool, file: str) -> Parity:
    """Of a model that merges tokens: of all images together, for of one image or two there are no flips to count. No batch may
    be all flips; those of one and two images count as one."""
    groups = [pairs[:2], *([pair] for pair in pairs[2:]), pairs]
    joined = [[torch.cat(tensors) for tensors in zip(*group, strict=True)] for group in groups]
    found = [parity_of_merging(outputs, reference, tolerance, classes) for outputs, reference in joined]
    for batch in found[:-1]:
        if batch.flipped == 1:
            require_parity(batch, tolerance, file)
    return found[-1]


def parity_of(outputs: Tensor, reference: Tensor, tolerance: float, classes: bool) -> Parity:
    """How near a file's outputs are to the model's; both logits [n, classes], or embeddings [n, ..., features]."""
    error = relative_error(outputs, reference)
    if classes:
        ties = agreement(outputs, reference, tolerance)
        return Parity(
            batch_size=len(outputs), relative_error=error, agreement=same_top1(outputs, reference), agreement_but_ties=ties
        )
    cosine = float(torch.cosine_similarity(outputs.double(), reference.double(), dim=-1).mean())
    return Parity(batch_size=len(outputs), relative_error=error, cosine=cosine)


def parity_of_merging(outputs: Tensor, reference: Tensor, tolerance: float, classes: bool) -> Parity:
    """As `parity_of`, of models that merge tokens: where two pairs of tokens are nearly as similar, rounding decides which is
    merged, and an image then differs by more than rounding."""
    differences = (outputs.double() - reference.double()).flatten(1).norm(dim=1)
    errors = differences / reference.double().flatten(1).norm(dim=1)
    same = errors <= tolerance
    whole = parity_of(outputs, reference, tolerance, classes)
    ties = agreement(outputs[same], reference[same], tolerance) if classes and same.any() else whole.agreement_but_ties
    flipped = float((~same).double().mean())
    return whole.model_copy(update={"relative_error": float(errors.median()), "agreement_but_ties": ties, "flipped": flipped})


def describe(layers: Mapping[str, ExportLayer], choices: Mapping[str, FormChoice]) -> list[ExportedLayer]:
    """How each layer was written."""
    return [
        ExportedLayer(
            name=name,
            shape=layer.weight.shape,
            block=layer.weight.block,
            density=layer.weight.density,
            form=choices[name].form,
            times_us=choices[name].times_us,
        )
        for name, layer in layers.items()
    ]


def real_images(batches: Batches, count: int) -> Tensor:
    """A fixed random choice of `count` images [count, C, H, W], repeated where the split holds fewer."""
    images = torch.cat([images for images, _ in batches.some(count)])
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


def require_parity(result: Parity, tolerance: float, file: str) -> None:
    differs = not result.relative_error <= tolerance or ((result.agreement_but_ties or 0) < 1 and result.cosine is None)
    if differs or (result.flipped or 0) > MOST_FLIPPED:
        raise CheckFailed(
            f"export: {file} disagrees with the model at batch {result.batch_size}: relative error "
            f"{result.relative_error:.1e} (at most {tolerance:g}), {result.likeness}",
            "try export.form=dense, another export.opset or export.precision; nothing was written",
        )


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """||logits - reference|| / ||reference||."""
    return float((logits.double() - reference.double()).norm() / reference.double().norm())


def same_top1(logits: Tensor, reference: Tensor) -> float:
    """Fraction of images [n, classes] whose top-1 is the same class."""
    return float((logits.argmax(dim=1) == reference.argmax(dim=1)).double().mean())


def agreement(logits: Tensor, reference: Tensor, tolerance: float) -> float:
    """Fraction of images [n, classes] whose top-1 agrees; a tie within `tolerance` of the row's norm counts as agreeing."""
    chosen = reference.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    return float((reference.amax(dim=1) - chosen <= tolerance * reference.norm(dim=1)).double().mean())
