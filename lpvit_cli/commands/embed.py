"""embed: the embeddings of images, by any model lpvit can open, in a file with their names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpvit_cli.commands.evaluate import WORKERS
from lpvit_cli.data.batches import Batches, batches
from lpvit_cli.data.readers import ALL, open_images
from lpvit_cli.devices import autocast, describe_device, pick_device, pick_dtype
from lpvit_cli.errors import UsageError, require
from lpvit_cli.export.opening import open_model
from lpvit_cli.files import whole, writing
from lpvit_cli.models.build import without_head
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.data import DataSection
from lpvit_cli.report.schema import EmbedReport
from lpvit_cli.sparse import freeze
from lpvit_cli.targets.base import ExportedModel


def embed(
    model_name: str, images: list[Path], output: Path, batch_size: int, device_name: str, dtype_name: str, progress: Progress
) -> EmbedReport:
    """Write embeddings [n, features] or [n, tokens, features], float32, in the order of the files, without unreadable ones.

    Raises UsageError where the output's ending is unknown, there are no images, or an exported file gives logits.
    """
    write = _writer(output)
    model = _for_embeddings(open_model(model_name)[0], model_name)
    exported = isinstance(model, ExportedModel)
    device = torch.device("cpu") if exported else pick_device(device_name)
    dtype = torch.float32 if exported else pick_dtype(dtype_name, device)
    data = DataSection(dataset="folder", root=None, labels="none", batch_size=batch_size, workers=WORKERS, max_corrupt=1.0)
    reader = ListedImages(images, data, model)
    source = batches(model, reader, data)
    embeddings, seconds = _run(model, source, device, dtype, progress)
    unreadable = set(source.skipped)
    names = [name for name in map(reader.filename, range(len(reader))) if name not in unreadable]
    with writing(output):
        beside = write(output, embeddings, names)
    return EmbedReport(
        device=describe_device(device),
        notes=source.notes(),
        model=model_name,
        output=str(output),
        names=None if beside is None else str(beside),
        shape=tuple(embeddings.shape),
        images_per_second=len(embeddings) / seconds,
        skipped_images=len(unreadable),
    )


class ListedImages:
    """Image files and the images of folders, in the order they were given, each by its path as the user would write it."""

    def __init__(self, places: list[Path], data: DataSection, model: VisionModel):
        self.files: list[Path] = []
        self.notes: list[str] = []
        for place in places:
            if place.is_dir():
                found = open_images(data.model_copy(update={"root": place}), ALL, model)
                self.files += [place / found.filename(i) for i in range(len(found))]  # type: ignore[union-attr,arg-type]
                self.notes += [f"{place}: {note}" for note in getattr(found, "notes", ())]
            elif place.is_file():
                self.files.append(place)
            else:
                raise UsageError(f"{place}: no such image or folder", "check the path")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.files[index].open("rb"), -1

    def __len__(self) -> int:
        return len(self.files)

    def filename(self, index: int) -> str:
        return str(self.files[index])


def _for_embeddings(model: VisionModel, name: str) -> VisionModel:
    if model.num_classes == 0:
        return model
    if isinstance(model, ExportedModel):
        raise UsageError(
            f"{name}: this file gives logits, and its embeddings cannot be reached",
            "embed the model folder it was made of, or export with --set task=features",
        )
    return without_head(model)


def _run(
    model: VisionModel, source: Batches, device: torch.device, dtype: torch.dtype, progress: Progress
) -> tuple[Tensor, float]:
    """All embeddings on the CPU, and the seconds from the first batch on."""
    with autocast(device, dtype):
        model = freeze(model.eval().to(device), min(source.share or source.batch_size, source.batch_size))
    found, done, began = [], 0, time.monotonic()
    for images, _ in source:
        with torch.inference_mode(), autocast(device, dtype):
            found.append(model(images.to(device, non_blocking=True)).float().cpu())
        done += len(images)
        progress("embedding", done, source.share, f"{done}/{source.share} images")
    return torch.cat(found), time.monotonic() - began


def _writer(output: Path) -> Callable[[Path, Tensor, list[str]], Path | None]:
    writers = {".npy": _npy, ".safetensors": _safetensors, ".parquet": _parquet}
    if output.suffix not in writers:
        raise UsageError(f"--output {output}: unknown ending {output.suffix!r}", f"use one of {', '.join(writers)}")
    if not output.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.parent}", "make it, or choose another place")
    if output.suffix == ".parquet":
        require("pyarrow")
    return writers[output.suffix]


def _npy(path: Path, embeddings: Tensor, names: list[str]) -> Path:
    """The array alone; the names, one a line, beside it."""
    beside = path.with_name(f"{path.name}.txt")
    with whole(path) as partial, whole(beside) as listed:
        with partial.open("wb") as file:
            np.save(file, embeddings.numpy())
        listed.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")  # as on the disk
    return beside


def _safetensors(path: Path, embeddings: Tensor, names: list[str]) -> None:
    """`embeddings`, and the names as a JSON list under `files` in the metadata."""
    from lpvit_cli.models.tensors import write_tensors

    with whole(path) as partial:
        write_tensors(partial, {"embeddings": embeddings.contiguous()}, {"files": json.dumps(names)})


def _parquet(path: Path, embeddings: Tensor, names: list[str]) -> None:
    """Columns `file` and `embedding`, a list of floats (of tokens, one after the other)."""
    import pyarrow
    from pyarrow import parquet

    flat = embeddings.flatten(1)
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat.numpy().ravel()), flat.shape[1])
    readable = [os.fsencode(name).decode(errors="replace") for name in names]
    with whole(path) as partial:
        parquet.write_table(pyarrow.table({"file": readable, "embedding": lists}), partial)
