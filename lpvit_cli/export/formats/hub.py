"""hub: a folder that is a Hugging Face repository, ready to be uploaded as it is."""

from __future__ import annotations

import json
from pathlib import Path

from lpvit_cli.export.documents import output_name, preprocessing_steps
from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.model_card import model_card, public_recipe
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Source, link
from lpvit_cli.machine import cpu_name, installed
from lpvit_cli.progress import Progress

FOLDER = "hub"
PACKAGES = ("lpvit", "torch", "timm", "onnx", "onnxruntime")


class Hub(Format):
    def write(self, source: Source, work: Path, progress: Progress) -> ExportedFile:
        """The model folder, the recipe, the ONNX file if one was written, and a model card; no path of this machine in any."""
        folder, published = work / FOLDER, source.publication()
        folder.mkdir()
        link(source.folder / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(source.config, indent=1))
        (folder / "recipe.yaml").write_text(public_recipe(published.recipe)[0])
        if onnx_file := source.file("onnx"):
            copy_onnx(work / onnx_file.file, folder / onnx_file.file)
        card = model_card(
            published,
            source.precision,
            onnx_file,
            cpu_name(),
            source.notes_by_format.get("onnx", []),
            preprocessing_steps(source.model),
            source.model.pretrained_cfg["input_size"],
            output_name(source.model),
            {package: installed(package) for package in PACKAGES},
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        return ExportedFile(format="hub", file=FOLDER, bytes=sum(path.stat().st_size for path in folder.iterdir()))


def copy_onnx(file: Path, target: Path) -> None:
    """The same file; weights that lie beside it are linked.

    What torch's exporter says of each node goes: where in the files of this machine it comes from.
    """
    import onnx

    graph = onnx.load(file, load_external_data=False)
    for node in graph.graph.node:
        del node.metadata_props[:]
    onnx.save(graph, target)
    if (data := file.with_name(f"{file.name}.data")).is_file():
        link(data, target.with_name(data.name))
