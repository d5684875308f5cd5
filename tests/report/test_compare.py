"""bench --compare: what passes, what fails, and what is no comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import Result
from made import batch_bench, bench
from made_times import energy_run, timed

from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.timing import TimingRun
from lpvit_cli.report.schema import BenchReport

Cli = Callable[..., Result]


def batch(load: float = 0.0, size: int = 64, **factors: float) -> BatchBench:
    """60 ms a call and 1 J an image, times each subject's factor; `sparse_energy`: of its joules alone."""
    energy = energy_run(1.0)
    times = {"dense": 60.0, "masked_dense": 60.6, "sparse": 45.0}
    timing = TimingRun(
        {name.replace("_", "-"): timed(ms * factors.get(name, 1)) for name, ms in times.items()}, threads=2, foreign_load=load
    )
    trials = [joule * factors.get("sparse_energy", 1) for joule in energy.subjects["sparse"].trials_joules_per_image]
    subjects = energy.subjects | {"sparse": replace(energy.subjects["sparse"], trials_joules_per_image=trials)}
    return batch_bench(size, 60, replace(energy, subjects=subjects)).model_copy(update={"timing": timing})


def saved(folder: Path, report: BenchReport) -> Path:
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "report.json").write_text(report.model_dump_json())
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return saved(tmp_path / "before", bench(batch()))


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({}, 0, "not worse: 0 of 2 numbers improved"),
        ({"sparse": 0.9}, 0, "not worse: 1 of 2 numbers improved"),
        ({"sparse": 1.003}, 0, "not worse"),  # within the interval: samples spread by 3 %
        ({"sparse": 1.1}, 4, "worse: sparse is 1.10x slower at batch 64, float32"),
        ({"sparse_energy": 1.2}, 4, "worse: sparse uses 1.20x more energy at batch 64, float32"),
        ({"masked_dense": 1.1}, 0, "not worse"),  # not lpvit's kernels
        ({"dense": 1.1}, 0, "the machine has changed: dense is 1.10x slower"),
        ({"dense": 1.1, "masked_dense": 1.1, "sparse": 1.1}, 0, "the machine has changed: dense is 1.10x slower"),
        ({"dense": 1.1, "masked_dense": 1.1, "sparse": 1.3}, 4, "sparse is 1.30x slower"),
        ({"dense": 0.9, "masked_dense": 0.9}, 0, "the machine has changed: dense is 1.11x faster"),
    ],
    ids=str,
)
def test_the_gate(lpvit: Cli, before: Path, tmp_path: Path, change: dict[str, Any], code: int, says: str) -> None:
    after = saved(tmp_path / "after", bench(batch(**change)))
    result = lpvit("bench", "--compare", before, after)
    assert result.code == code, result.err
    assert says in " ".join(result.out.split())
    assert "sparse" in result.out
    document = json.loads(lpvit("bench", "--compare", before, after, "--json").out)
    assert says in document["verdict"]
    assert any(one["worse"] for one in document["changes"]) is (code == 4)
    assert ("error" in document) is (code == 4)


def test_a_report_may_be_named_by_itself_its_folder_or_its_run(lpvit: Cli, before: Path) -> None:
    for path in (before, before / "bench", before / "bench" / "report.json"):
        assert lpvit("bench", "--compare", before, path).code == 0


def other_device(report: BenchReport) -> BenchReport:
    return report.model_copy(update={"device": "NVIDIA H100", "threads": 4})


def other_batch(report: BenchReport) -> BenchReport:
    return report.model_copy(update={"batches": [*report.batches, batch(size=128)]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_device, ["device: AMD EPYC 9V74 80-Core Processor -> NVIDIA H100", "CPU threads: 2 -> 4"]),
        (other_batch, ["batch sizes: 64 -> 64, 128"]),
        (lambda report: report.model_copy(update={"flops_dense": 10**9}), ["dense GFLOPs of an image: 35.12"]),
    ],
)
def test_different_settings_are_refused_and_listed_unless_forced(
    lpvit: Cli, before: Path, tmp_path: Path, change: Callable[[BenchReport], BenchReport], told: list[str]
) -> None:
    after = saved(tmp_path / "after", change(bench(batch())))
    refused = lpvit("bench", "--compare", before, after)
    assert refused.code == 2
    assert all(difference in refused.err for difference in told)
    assert "--force" in refused.err
    forced = lpvit("bench", "--compare", before, after, "--force")
    assert forced.code == 0
    assert all(f"differs: {difference}" in forced.out for difference in told)


def test_nothing_in_common_is_no_comparison_even_by_force(lpvit: Cli, before: Path, tmp_path: Path) -> None:
    after = saved(tmp_path / "after", bench(batch(size=8)))
    result = lpvit("bench", "--compare", before, after, "--force")
    assert (result.code, "no subject of the same batch size" in result.err) == (2, True)


def test_doubtful_reports_are_named(lpvit: Cli, before: Path, tmp_path: Path) -> None:
    after = saved(tmp_path / "after", bench(batch(load=0.4)))
    assert (
        "note: second report: other processes used up to 40% of the machine" in lpvit("bench", "--compare", before, after).out
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no report of bench there"),
        ("{", "not a report of this lpvit's bench: Invalid JSON"),
        ('{"stage": "bench"}', "not a report of this lpvit's bench"),
        (bench().model_dump_json().replace('"schema_version":2', '"schema_version":1'), "schema_version: Input should be 2"),
    ],
    ids=["absent", "damaged", "foreign", "old"],
)
def test_what_is_no_report_is_told_so(lpvit: Cli, before: Path, tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    result = lpvit("bench", "--compare", before, path)
    assert result.code == 2
    assert says in result.err
    assert "lpvit bench RECIPE" in result.err
    assert "Traceback" not in result.err
