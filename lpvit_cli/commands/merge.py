"""merge: a pruned model folder and an adapter over it -> one model folder, every zero block still zero."""

from __future__ import annotations

import shutil
from pathlib import Path

from lpvit_cli.errors import UsageError
from lpvit_cli.files import beside, clear, publish, writing
from lpvit_cli.models.folder import load_model, read_config, save_model
from lpvit_cli.recovery.lora import load_adapted
from lpvit_cli.recovery.lora import merge as merge_adapters
from lpvit_cli.sparse.masks import block_masks, require_same_masks


def merge(base: Path, adapter: Path, output: Path, overwrite: bool) -> None:
    """Write the model folder `output`, whole or not at all. Raises UsageError when something is there already."""
    free = overwrite and (output / "config.json").is_file() and not (output / "stage.json").exists()  # no run's artefact
    if output.exists() and (not free or output.resolve() == base.resolve()):
        raise UsageError(f"{output}: exists already", "choose another --output, or --overwrite a model folder")
    model = load_adapted(base, adapter)
    merge_adapters(model)
    work = beside(output, "partial")
    with writing(output):
        clear(work)
        work.mkdir(parents=True)
        try:
            save_model(work, model, {**read_config(base), "parent": str(base)})
            require_same_masks(block_masks(load_model(base)), block_masks(load_model(work)))
            publish(work, output)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
