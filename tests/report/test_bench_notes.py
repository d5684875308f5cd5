"""The sentences beside a bench's numbers, and what of a bench is drawn."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import batch_bench, deit_base_layers, layers_bench, prune, replace_timing, traced_bench
from made_times import averaged, energy_run, timed

from lpvit_cli.bench.notes import advice, doubts, verdicts
from lpvit_cli.bench.results import BatchBench
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import Timing, TimingRun
from lpvit_cli.report.html import write_html
from lpvit_cli.report.pictures import distribution, energy_picture, latency_picture, layers_picture, power_picture

SLOWER, FASTER, EQUAL = Ratio(0.8, 0.7, 0.9), Ratio(1.3, 1.2, 1.4), Ratio(1.0, 0.9, 1.1)


def batch(size: int, ratio: Ratio = FASTER, load: float | None = 0.0, **flags: dict[str, Any]) -> BatchBench:
    """`flags`: changes of the subjects' timings, by subject."""
    made = batch_bench(size, 10)
    timings: dict[str, Timing] = {name: replace(timed, **flags.get(name, {})) for name, timed in made.timing.subjects.items()}
    timing = TimingRun(timings, threads=2, foreign_load=load)
    return made.model_copy(update={"timing": timing, "speedup": made.speedup | {"sparse": ratio}})


def test_advice_says_from_which_batch_on_it_pays() -> None:
    assert advice([batch(1, SLOWER), batch(8, EQUAL), batch(64, FASTER)]) == [
        "batch 1 gives a block too little work; of the batches measured, sparse pays from 64 on"
    ]
    assert advice([batch(1, FASTER), batch(8, FASTER)]) == []
    assert "try taller blocks or more sparsity" in advice([batch(1, SLOWER), batch(8, SLOWER)])[0]
    assert "try taller blocks" in advice([batch(1, FASTER), batch(8, SLOWER)])[0]
    assert advice([batch(1, SLOWER, load=0.5), batch(8, FASTER)]) == [], "not on a busy machine"
    other = batch(64, FASTER).model_copy(update={"dtype": "bfloat16"})
    assert "try taller blocks" in advice([batch(1, SLOWER), other])[0], "of the first dtype"


def test_doubts_name_what_is_doubtful_and_where() -> None:
    calm = [batch(1), batch(8)]
    assert doubts(calm) == ["30 calls: p99 is close to the slowest of them"]
    for change in ({"samples_ms": [1.0] * 100}, {"calls_per_sample": 4}):
        assert doubts([batch(1, **dict.fromkeys(("dense", "masked-dense", "sparse"), change))]) == [], "at least 100 calls"
    unknown = {"percentiles": None, "quantiles_ms": None, "calls_per_sample": 200}
    (note,) = doubts([batch(1, **dict.fromkeys(("dense", "masked-dense", "sparse"), unknown))])
    assert note.startswith("percentiles of calls are not known, the calls are too short to time them one by one")
    assert note.endswith(": dense, masked-dense, sparse at batch 1, float32")
    assert doubts([batch(1, sparse=unknown)])[0] == "30 calls: p99 is close to the slowest of them", "of the others"
    shaky = batch(8, sparse={"variation": 0.04}, dense={"variation": 0.026})
    assert "unstable, times vary by more than 2.5%: dense, sparse at batch 8, float32" in doubts([batch(1), shaky])
    starved = batch(1, sparse={"host_bound": True})
    assert doubts([starved, batch(8)])[-1].endswith("(try a larger batch, or -graph): sparse at batch 1, float32")
    assert "up to 40% of the machine" in doubts([batch(1, load=0.4), batch(8, load=0.2)])[-1]
    assert doubts([batch(1, load=None)]) == doubts(calm)


def test_the_batch_where_sparse_helps_most_has_the_first_word() -> None:
    said = {
        size: batch(size, ratio).model_copy(update={"verdict": f"batch {size}"})
        for size, ratio in {1: SLOWER, 8: FASTER, 64: Ratio(1.7, 1.6, 1.8), 256: Ratio(1.7, 1.6, 1.8), 512: EQUAL}.items()
    }
    assert verdicts(list(said.values())) == [f"batch {size}" for size in (64, 1, 8, 256, 512)]
    noisy = batch(2, Ratio(3.0, 0.9, 9.0)).model_copy(update={"verdict": "batch 2"})
    assert verdicts([noisy, said[8]]) == ["batch 8", "batch 2"], "a ratio that may be noise is no help"
    none = "the pruned model is not faster at any batch measured: 1, 512"
    assert verdicts([said[1], said[512]]) == [none, "batch 1", "batch 512"]
    assert verdicts([said[1]]) == ["batch 1"], "which says it already"


def test_the_drawn_distribution_is_of_calls_where_they_are_known() -> None:
    spiky = replace(timed(1.0), quantiles_ms=[1.0] * 96 + [123.0] * 5)
    times, shares = distribution(spiky)
    assert (shares[0], shares[50], shares[100]) == (0, 50, 100)
    assert (times[95], times[96]) == (1.0, 123.0)
    means = averaged(1.0)
    assert distribution(means)[0] == sorted(means.samples_ms)
    drawn = latency_picture(replace_timing(batch_bench(1, 1.0), sparse=means))
    assert f"<!-- sparse, means of 200 calls, median {means.median_ms:.2f} ms -->" in drawn
    assert f"<!-- dense, median {timed(1.0).median_ms:.2f} ms -->" in drawn


def test_power_is_drawn_with_every_window_and_the_idle_device() -> None:
    (batch,) = traced_bench().batches
    assert batch.energy is not None
    drawn = power_picture(batch, batch.energy)
    assert "<!-- idle, 72 W -->" in drawn
    assert all(f"<!-- {name}, 412 W -->" in drawn for name in batch.energy.subjects)
    without = replace(
        batch.energy, subjects={name: replace(one, windows=[], trace=None) for name, one in batch.energy.subjects.items()}
    )
    bare = power_picture(batch, without)
    count = len(re.findall(r'<g id="patch_', drawn)) - len(re.findall(r'<g id="patch_', bare))
    assert count == 3 * 8, "three subjects, eight trials"


def test_energy_is_drawn_with_its_interval() -> None:
    batch = batch_bench(1, 8.1, energy_run(1.2345))
    assert batch.energy is not None
    drawn = energy_picture(batch, batch.energy)
    assert all(f"<!-- {name} -->" in drawn for name in batch.energy.subjects)
    assert drawn.count('id="LineCollection_') == 3, "an interval for each"


def test_layers_are_drawn_with_all_else() -> None:
    drawn = layers_picture(batch_bench(1, 8.1), layers_bench())
    names = re.findall(r"<!-- (blocks\.\S+|all else) -->", drawn)
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "all else"]
    rest = layers_bench()
    assert (rest.rest_ms, rest.rest_ms_dense, rest.rest_share) == (2.0, 3.0, 0.2)


def test_each_subject_has_a_colour_of_its_own() -> None:
    """However many there are: 14 kinds and a baseline."""
    made = batch_bench(1, 8.1)
    timed = made.timing.subjects["dense"]
    timing = replace(made.timing, subjects=dict.fromkeys(("dense", "masked-dense", "sparse", *"abcdefghijkl"), timed))
    drawn = latency_picture(made.model_copy(update={"timing": timing}))
    colours = set(re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 2[;\"]", drawn))
    assert len(colours) == 15


@pytest.mark.parametrize("gone", ["energy", "layers"])
def test_what_was_not_measured_has_no_picture(gone: str, tmp_path: Path) -> None:
    report = traced_bench()
    batch = report.batches[0].model_copy(update={gone: None})
    write_html(
        tmp_path / "a.html", "a", report.model_copy(update={"batches": [batch]}), prune(layers=deit_base_layers(1)), None
    )
    page = (tmp_path / "a.html").read_text()
    assert ("Power, batch 128" in page) is (gone != "energy")
    assert ("Layers, batch 128" in page) is (gone != "layers")
