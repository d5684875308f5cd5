"""What a recovery went through, as JSON lines: one for each step and one after each epoch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, computed_field

from lpvit_cli import distributed
from lpvit_cli.files import open_unlinked, parse_json, replace_text


class History:
    """A file that the main process appends to, cut back to a checkpoint when steps are made again; None: no file."""

    def __init__(self, path: Path | None):
        self.path = path

    def add(self, **entry: Any) -> None:
        if self.path is not None and distributed.is_main():
            self.path.parent.mkdir(exist_ok=True)
            with open_unlinked(self.path, os.O_APPEND) as file:
                file.write(json.dumps(entry) + "\n")

    def cut(self, steps: int, epochs: int) -> None:
        """Forget what came after so many steps and epochs, and a line that a kill has cut short."""
        if self.path is not None and distributed.is_main() and self.path.is_file():
            lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            replace_text(self.path, "".join(line for line in lines if line.endswith("\n") and _within(line, steps, epochs)))


def _within(line: str, steps: int, epochs: int) -> bool:
    """Whether an entry is of those; a damaged line is of none."""
    try:
        entry = parse_json(line)
        within: bool = entry["step"] <= steps if "step" in entry else entry["epoch"] <= epochs
    except (ValueError, KeyError, TypeError):
        return False
    return within


def read_losses(path: Path) -> list[float]:
    """The training loss of every step."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["loss"] for entry in entries if "step" in entry]


class Epoch(BaseModel):
    """Loss and accuracy (None: without labels) while training, and the points of the validation images after it."""

    epoch: int
    loss: float
    top1: float | None
    validation: float  # in points of the task's metric: top-1 or agreement in percent, hundredths of the mean cosine
    images_per_second: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def validation_top1(self) -> float | None:
        return None if self.top1 is None else self.validation
