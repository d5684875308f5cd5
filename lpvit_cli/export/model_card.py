"""What may be told of a run outside this machine, and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lpvit_cli.export.documents import document
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Publication
from lpvit_cli.numbers import by, giga, interval, percent, size
from lpvit_cli.recipe.model import TRANSFORMERS
from lpvit_cli.recipe.source import PATHS


def public_recipe(recipe: Any) -> tuple[str, list[str]]:
    """The recipe as YAML with file names for paths, and these names: they are meant from the recipe's own folder."""
    content: dict[str, Any] = recipe.model_dump(mode="json")
    names = []
    for *sections, key in sorted(PATHS):
        section: Any = content
        for name in sections:
            section = section and section[name]  # a section may be left out
        if section and (path := section[key]) and isinstance(path, str):  # a class map may be a list
            section[key] = Path(path).name
            names.append(f"`{'.'.join([*sections, key])}` is `{Path(path).name}`")
    content["model"]["name"] = public_name(content["model"]["name"])
    return yaml.safe_dump(content, sort_keys=False), names


def public_name(name: str) -> str:
    """A model's name without the path of a local checkpoint."""
    family, path = name[: len(TRANSFORMERS)], Path(name[len(TRANSFORMERS) :])
    return f"{family}./{path.name}" if family == TRANSFORMERS and path.is_absolute() else name


def model_card(
    published: Publication,
    precision: str,
    onnx: ExportedFile | None,
    onnx_device: str,
    onnx_notes: list[str],
    preprocessing: list[str],
    input_size: tuple[int, int, int],
    output: str,
    versions: dict[str, str | None],
) -> str:
    """README.md: front matter, then what the reports say; what none of them measured is called not measured."""
    recipe, pruned = published.recipe, published.pruned
    return document(
        "model_card.md",
        recipe=recipe,
        model_name=public_name(recipe.model.name),
        precision=precision,
        base_model=recipe.model.name.removeprefix("hf-hub:") if recipe.model.name.startswith("hf-hub:") else None,
        pruned=pruned,
        finetuned=published.finetuned,
        bench=published.bench,
        onnx=onnx,
        onnx_device=onnx_device,
        onnx_notes=onnx_notes,
        blocks=", ".join(sorted({by(layer.block) for layer in pruned.layers})),
        qualities=_qualities(published, precision, onnx),
        output=output,
        files_needed=public_recipe(recipe)[1],
        preprocessing=preprocessing,
        input_size=input_size,
        versions=", ".join(f"{package} {number}" for package, number in versions.items() if number),
        giga=giga,
        interval=interval,
        percent=percent,
        size=size,
    )


def _qualities(published: Publication, precision: str, onnx: ExportedFile | None) -> dict[str, list[str]]:
    """By row of the card's table, a text for each figure of the dense model's quality."""
    dense = published.pruned.quality_dense
    recovered = published.finetuned.quality if published.finetuned else None
    rows = {"dense": dense, "pruned, one-shot": published.pruned.quality, "recovered": recovered}
    rows |= {f"ONNX file, {precision}": onnx.quality} if onnx else {}
    known = {
        name: {figure.name: figure.text for figure in quality.figures} if quality else {} for name, quality in rows.items()
    }
    return {name: [texts.get(figure.name, "not measured") for figure in dense.figures] for name, texts in known.items()}
