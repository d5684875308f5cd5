"""Reports as files: what is written comes back, and the schema that is documented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made import ALL, calibrate, deit_base_layers, prune
from pydantic import ValidationError
from shown import shown, words

from lpvit_cli.report.schema import BenchReport, CalibrateReport
from lpvit_cli.stages import ALL_STAGES


@pytest.mark.parametrize("kind", ALL)
def test_reports_come_back_from_json_as_they_were(kind: str) -> None:
    report = ALL[kind]()
    text = report.model_dump_json(indent=1)
    assert type(report).model_validate_json(text) == report
    assert json.loads(text)["schema_version"] == (2 if kind.startswith("bench") else 1)


def test_a_report_with_an_unknown_key_is_refused() -> None:
    content = json.loads(calibrate().model_dump_json())
    with pytest.raises(ValidationError, match="surprise"):
        CalibrateReport.model_validate({**content, "surprise": 1})


def test_a_power_model_of_zero_predicts_nothing() -> None:
    free = [made.model_copy(update={"energy_uj": 0.0, "energy_uj_dense": 0.0}) for made in deit_base_layers(1)]
    assert "predicted uJ/image" not in words(shown(prune(layers=free)))


def test_every_stage_has_a_report_that_can_be_rendered() -> None:
    rendered = {type(make()) for make in ALL.values()}
    assert {stage.report_class for stage in ALL_STAGES} <= rendered


def test_the_documented_schema_of_a_bench_is_that_of_the_code() -> None:
    documented = json.loads((Path(__file__).parents[2] / "docs" / "bench.schema.json").read_text())
    assert documented == BenchReport.model_json_schema(), "run: python -m lpvit_cli.report.schema > docs/bench.schema.json"
