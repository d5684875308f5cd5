"""What a file is compared with: the fastest free form of the dense model that keeps its quality. Times are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from helpers import random_model

from lpvit_cli.errors import CheckFailed, EnvironmentFault
from lpvit_cli.export import onnx_file, speed
from lpvit_cli.export.onnx_file import DENSE_INT8, FILE, INT8, _over_dense, write_dense
from lpvit_cli.export.results import ExportSpeed
from lpvit_cli.export.source import Source
from lpvit_cli.export.speed import Free
from lpvit_cli.measure.timing import Timing, TimingRun
from lpvit_cli.recipe.export import ExportSection
from lpvit_cli.targets.onnxruntime import session
from lpvit_cli.tasks.quality import ClassificationQuality

FLOAT32 = "dense float32 in onnxruntime"


def source(max_drop: float = 1.0) -> Source:
    facts: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Source) if field.init)
    facts |= {"notes": [], "qualities": {}, "threads": 1, "batch_size": 1, "settings": ExportSection(max_drop=max_drop)}
    return Source(**facts | {"quality_dense": ClassificationQuality(100, 98.0, 99.0)})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExportSpeed]:
    """`measure` of a file that takes 1 ms, beside dense float32 and int8 that take as long as is said."""

    def measure(of: Source, float32: float, int8: float, judge: Callable[[], Any]) -> ExportSpeed:
        def pretend(opened: dict[str, Any], **_: Any) -> TimingRun:
            assert list(opened) == ["dense", INT8, "model.onnx"]
            times = dict(zip(opened, (float32, int8, 1.0), strict=True))
            timings = {name: Timing([ms] * 12, None, ms, 0.0, 1, None, False) for name, ms in times.items()}
            return TimingRun(timings, threads=1, foreign_load=0.0)

        monkeypatch.setattr(speed, "time_in_visits", pretend)
        nothing: Any = None
        free = [Free(FLOAT32, nothing), Free(INT8, nothing, judge)]
        return speed.measure(of, "model.onnx", nothing, free, lambda *_: None)

    return measure


def good() -> ClassificationQuality:
    return ClassificationQuality(100, 97.5, 99.0)


def never() -> ClassificationQuality:
    raise AssertionError("the slower one need not be evaluated")


def test_the_best_free_one_leads_and_is_named(measured: Any) -> None:
    found = measured(source(), 3.0, 2.0, good)
    assert found.verdict.startswith(f"model.onnx is 2.00x faster than the best free alternative: {INT8} (95 %")
    assert found.verdict.endswith(f"; 3.00x as fast as {FLOAT32}")
    assert (found.best_free, found.speedup_over_best_free.value, found.speedup.value) == (INT8, 2.0, 3.0)
    assert [(form.subject, form.median_ms, form.quality.top1, form.counts) for form in found.free] == [
        ("dense", 3.0, 98.0, True),
        (INT8, 2.0, 97.5, True),
    ]


def test_a_file_that_only_beats_float32_is_called_slower(measured: Any) -> None:
    found = measured(source(), 2.0, 0.5, good)
    assert found.verdict.startswith(f"model.onnx is 2.00x slower than the best free alternative: {INT8}")
    assert (found.speedup.value, found.speedup_over_best_free.value) == (2.0, 0.5)


@pytest.mark.parametrize(("top1", "counts"), [(96.9, False), (97.1, True)])
def test_one_that_loses_too_much_is_told_and_not_counted(measured: Any, top1: float, counts: bool) -> None:
    of, judged = source(), []

    def judge() -> ClassificationQuality:
        judged.append(top1)
        return ClassificationQuality(100, top1, 99.0)

    for _ in range(2):  # as for two formats
        found = measured(of, 3.0, 2.0, judge)
    assert judged == [top1], "once"
    assert found.best_free == (INT8 if counts else FLOAT32)
    assert found.speedup_over_best_free.value == (2.0 if counts else 3.0)
    assert found.free[1].counts is counts
    lost = f"{INT8} is no alternative: top-1 96.90 %, dense float32 98.00 %, more than export.max_drop = 1 points are lost"
    assert of.notes == ([] if counts else [lost])


def test_a_slower_one_is_not_evaluated_and_an_unknown_quality_counts(measured: Any) -> None:
    found = measured(source(), 2.0, 3.0, never)
    assert (found.best_free, found.free[1].quality) == (FLOAT32, None)
    assert found.verdict.startswith(f"model.onnx is 2.00x faster than the best free alternative: {FLOAT32} (")
    of = source()
    of.qualities[INT8] = None
    assert measured(of, 3.0, 2.0, never).best_free == INT8


def test_an_int8_file_is_written_dense_where_dense_int8_is_faster(measured: Any) -> None:
    found = measured(source(), 2.0, 0.5, good)
    assert [_over_dense(found, precision) for precision in ("float32", "int8", "int8-static")] == [2.0, 0.5, 0.5]


def test_without_the_dense_weights_times_are_taken_of_random_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline() -> Any:
        raise EnvironmentFault("weights: not here", "")

    written = []
    monkeypatch.setattr(onnx_file, "write_dense", lambda model, *_: written.append(model))
    of = dataclasses.replace(source(), trained=offline, dense=lambda: "random", precision="float32")  # type: ignore
    onnx_file.dense_file(of, tmp_path)
    assert (written, of.qualities) == (["random"], {INT8: None})
    assert of.notes == [f"the quality of {INT8} is not known: weights: not here"]


def test_dense_int8_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def odd(_: Any, __: Any, ___: Any, folder: Path, *more: Any) -> None:
        (folder / FILE).write_bytes(b"float32")
        raise CheckFailed("a layer is not in the graph", "")

    monkeypatch.setattr(onnx_file, "write_dense", odd)
    of = dataclasses.replace(source(), trained=lambda: random_model("vit"), precision="float32")  # type: ignore
    assert [form.name for form in onnx_file.free_forms(of, tmp_path)] == [FLOAT32]
    assert of.notes == [f"{INT8} was not measured: a layer is not in the graph"]


def test_reports_of_earlier_versions_are_read(measured: Any) -> None:
    old = measured(source(), 3.0, 2.0, good).model_dump(mode="json", exclude={"free", "best_free", "speedup_over_best_free"})
    assert ExportSpeed.model_validate(old).free == []


def test_dense_int8_is_the_same_model(tmp_path: Path) -> None:
    model = random_model("vit")
    write_dense(model, lambda name: name.startswith("blocks"), 20, tmp_path, {}, int8=True)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = model(x)
    for file, near in ((FILE, 1e-4), (DENSE_INT8, 0.1)):
        output = torch.from_numpy(session(tmp_path / file).run(None, {"images": x.numpy()})[0])
        assert (output - reference).norm() < near * reference.norm()
    products = [node.op_type for node in onnx.load(tmp_path / DENSE_INT8).graph.node]
    linears = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name.startswith("blocks")]
    assert products.count("MatMulIntegerToFloat") == len(linears)
