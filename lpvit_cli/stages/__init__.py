"""The stages of a run, in order: what each is called, what it writes, and which recipe keys its result depends on.

Light on purpose (no torch): the command line and resuming need the table, the work itself is imported when it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One step of a run. `module` holds the function `run_stage(recipe, run, work, progress) -> pydantic report`."""

    command: str
    folder: str
    module: str
    depends_on: tuple[str, ...]  # prefixes of recipe keys
    summary: str
    timed: bool = False  # its numbers hold only on the device they were taken on

    def reads(self, key: str) -> bool:
        """Whether the result depends on this recipe key."""
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in self.depends_on)

    @property
    def function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = import_module(f"lpvit_cli.stages.{self.module}").run_stage
        return function


CALIBRATE = Stage(
    "calibrate",
    "calibration",
    "calibrate",
    (
        "seed",
        "model",
        "data.dataset",
        "data.root",
        "data.train_split",
        "data.max_corrupt",
        "calibrate.images",
        "calibrate.gradient",
        "prune.layers",
    ),
    "Gather statistics of the dense model on calibration images.",
)
PRUNE = Stage(
    "prune",
    "pruned",
    "prune",
    ("data.val_split", "data.val_images", "prune"),
    "Choose the blocks to remove under the budget and write the block-sparse model.",
)
SWEEP = Stage(
    "sweep",
    "sweep",
    "sweep",
    (*PRUNE.depends_on, "sweep", "profile.batch_size", "bench.threads", "bench.dtypes", "bench.rounds", "dtype"),
    "Prune to several budgets from one calibration.",
    timed=True,
)
FINETUNE = Stage(
    "finetune-lora-ga",
    "finetuned",
    "finetune",
    ("seed", "dtype", "data.batch_size", "finetune"),
    "Recover accuracy with LoRA-GA; every zero block stays zero.",
)
BENCH = Stage(
    "bench",
    "bench",
    "bench",
    ("bench", "dtype"),
    "Measure latency, memory and energy of the pruned model against dense ones; --compare checks two reports.",
    timed=True,
)
EXPORT = Stage(
    "export",
    "export",
    "export",
    ("export",),
    "Write files that run without lpvit, faster than dense ones, checked on real images.",
    timed=True,
)
PROFILE = Stage(
    "profile",
    "profile",
    "profile",
    (
        "seed",
        "dtype",
        "model.name",
        "model.kwargs",
        "prune.block",
        "prune.layers",
        "profile",
        "bench.threads",
        "bench.dtypes",
        "bench.energy.window_seconds",
    ),
    "Measure what each layer takes on this device, by the fraction of its blocks kept.",
    timed=True,
)
GRADUAL = Stage(
    "gradual",
    "gradual",
    "gradual",
    tuple(dict.fromkeys((*CALIBRATE.depends_on, "calibrate", *PRUNE.depends_on, *FINETUNE.depends_on, "schedule"))),
    "Prune and recover in turns, over the budgets of the recipe's schedule.",
)
STAGES = (CALIBRATE, PRUNE, FINETUNE, BENCH, EXPORT)  # what `lpvit run` runs
ALL_STAGES = (*STAGES, SWEEP, GRADUAL, PROFILE)
