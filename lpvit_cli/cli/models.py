"""Commands on one model: evaluate, predict, embed, merge, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lpvit_cli.cli.common import BatchSize, Device, Dtype, ModelArgument, app, command
from lpvit_cli.cli.console import Console


@command(app)
def evaluate(
    console: Console,
    model: ModelArgument,
    dataset: Annotated[str | None, typer.Option("--dataset", help="digits, folder, tar, hfds/NAME or wds/NAME.")] = None,
    root: Annotated[Path | None, typer.Option("--root", help="Where the images are.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Which split (default: the one it was validated on).")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Evaluate on this many images only.")] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="Compare with this model; dense: the one it was pruned from."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="FOLDER", help="Of embeddings: k-NN among these images, one folder for each class."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="none", help="none: folders and labels are no classes of the model.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """How good a model folder, an exported file or a timm model is: top-1 and top-5, or what its embeddings are worth."""
    from lpvit_cli.commands.evaluate import evaluate as evaluate_any

    report = evaluate_any(
        model,
        dataset,
        root,
        split,
        limit,
        batch_size or 64,
        device or "auto",
        dtype or "auto",
        reference,
        train,
        labels,
        console.progress,
    )
    _print(console, report, model)


@command(app)
def predict(
    console: Console,
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to print.")] = 5,
    device: Device = None,
) -> None:
    """The most likely classes of images, with the preprocessing the model was made with."""
    from lpvit_cli.commands.predict import predict as predict_any

    _print(console, predict_any(model, images, top, device or "auto"), model)


@command(app)
def embed(
    console: Console,
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES|FOLDER...", help="Image files, or folders of them.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="What to write: a .npy, .safetensors or .parquet file.")
    ],
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write the embeddings of images, with their file names; of a model with a head, those of the model without it."""
    from lpvit_cli.commands.embed import embed as embed_any

    report = embed_any(model, images, output, batch_size or 32, device or "auto", dtype or "auto", console.progress)
    _print(console, report, model)


@command(app)
def merge(
    console: Console,
    base: Annotated[Path, typer.Argument(metavar="PRUNED", help="The model folder that was recovered, RUN/pruned.")],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A recovered folder, or its adapter.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder.")] = False,
) -> None:
    """Add an adapter into the pruned model it was made for; every zero block stays zero."""
    from lpvit_cli.commands.merge import merge as merge_any

    merge_any(base, adapter, output, overwrite)
    console.document = {"model": str(output)}
    console.human(f"merged {adapter} into {base}; zero blocks checked; model folder: {output}")


@command(app)
def tune(
    console: Console,
    model: ModelArgument,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Batch to tune for; repeatable (default: those of the run, else 1, 16, 256)."),
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Tune the backward pass too.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: the target's).")] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Time every way to run each block-sparse layer on this device, dense included; lpvit then takes the fastest."""
    from lpvit_cli.commands.tune import tune_any

    _print(console, tune_any(model, batch_size, training, threads, device, dtype, console.progress), model)


def _print(console: Console, report: Any, model: str) -> None:
    from lpvit_cli.report.terminal import render

    console.document = report.model_dump(mode="json")
    console.human(*render(report, Path(model)))
