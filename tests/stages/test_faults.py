"""A sample of tests/stress: kills and failing disks at a few file operations of some stages."""

from __future__ import annotations

from pathlib import Path

import yaml
from fault_cases import CASES, Ground, tried
from faults import Fault


def test_kills_and_failing_disks(tmp_path: Path) -> None:
    ground = Ground(CASES["finetune-lora-ga"], tmp_path)
    named = {operation: at for at, operation in enumerate(ground.operations, start=1)}  # the last of each
    checkpoint = named["os.rename /run/.finetuned.progress/.checkpoint.safetensors.partial"]
    published = named["os.rename /run/.finetuned.partial"]
    kills = [Fault("torn", checkpoint - 2), Fault("kill", published + 1)]
    assert tried(kills, ground.killed) == (len(kills), [])
    disks = [Fault("no bytes", checkpoint - 2), Fault("read-only", published)]
    assert tried(disks, ground.refused) == (len(disks), [])


def test_a_kill_in_a_new_folder(tmp_path: Path) -> None:
    ground = Ground(CASES["calibrate"], tmp_path)
    recipe = ground.operations.index("os.rename /run/.recipe.yaml.tmp") + 1
    assert tried([Fault("kill", recipe)], ground.killed) == (1, [])


def test_the_nightly_workflow_tries_every_case() -> None:
    path = Path(__file__).parents[2] / ".github" / "workflows" / "stress.yml"
    parts = yaml.safe_load(path.read_text())["jobs"]["stress"]["strategy"]["matrix"]["part"]
    files = {part.partition("::")[0] for part in parts}
    assert files == {file.name for file in (path.parents[2] / "tests" / "stress").glob("test_*.py")}
    tried = {part.partition("[")[2] for part in parts} - {""}
    assert tried == {f"{what}-{name}]" for what in ("kill", "disk") for name in CASES}
