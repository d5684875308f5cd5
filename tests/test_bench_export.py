"""scripts/bench_export.py: one small case end to end, and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_export
import pytest
import timm
from bench_export import SHOWN, Bench, Case, cases, draw


def test_a_case_is_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, depth=1))
    monkeypatch.setattr(bench_export, "SAMPLES", 2)
    rows: list[dict[str, Any]] = []
    bench = Bench(tmp_path)
    for sparsity in (0.5, 0.8):
        rows += bench.rows(Case("DeiT-S", (128, 64), sparsity, 1, 1, (*SHOWN, "auto int8")))
    assert [row["file"] for row in rows] == 2 * ["dense", *SHOWN, "auto int8"]
    assert {row["ratio"] for row in rows if row["file"] == "dense"} == {1.0}
    for row in rows:
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["file"] == "dense" or (row["size"] < 0.9 and sum(row["forms"].values()) == 4)
    draw(rows, tmp_path / "picture.svg")
    assert "128x64" in (tmp_path / "picture.svg").read_text()


def test_the_numbers_asked_for_come_first() -> None:
    first = next(cases())
    assert (first.model, first.sparsity, first.threads, first.batch) == ("DeiT-B", 0.7, 1, 1)
