"""What the terminal shows of findings and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from shown import printed, words

from lpvit_cli.commands.doctor import Finding
from lpvit_cli.recipe.shipped import shipped_recipes
from lpvit_cli.report.terminal.tools import findings_table, recipes_table


def test_every_finding_is_listed_with_a_remedy_where_it_is_not_ok() -> None:
    findings = [
        Finding("torch", True, "2.7.0", "never needed"),
        Finding("GPU", False, "no usable CUDA device", "install a CUDA build of torch"),
        Finding("onnx", False, "not installed", "pip install onnx onnxscript onnxruntime"),
    ]
    lines = [words(line) for line in printed(findings_table(findings)).splitlines()]
    assert lines == [
        "ok torch 2.7.0",
        "-- GPU no usable CUDA device",
        "install a CUDA build of torch",
        "-- onnx not installed",
        "pip install onnx onnxscript onnxruntime",
    ]


def test_every_shipped_recipe_is_listed_with_what_it_is_for() -> None:
    paths = list(shipped_recipes())
    text = printed(recipes_table(paths))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    listed = {line.split()[0] for line in text.splitlines() if not line.startswith(" ")}
    assert listed == {path.stem for path in paths}
    assert "DeiT-B at half its FLOPs" in text
    assert "data.root" not in text


@pytest.mark.parametrize(("head", "about"), [("# lpvit run a\n#\n# For [red] things. More.\n", "For [red] things"), ("", "")])
def test_a_recipe_without_a_comment_is_listed_all_the_same(tmp_path: Path, head: str, about: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{head}name: mine\n")
    assert words(printed(recipes_table([path]))) == f"mine {about}".strip()
