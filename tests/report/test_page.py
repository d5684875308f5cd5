"""Reports made by hand: what the page shows of them, and that nothing is invented or executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made import (
    CPU,
    DEAD_METER,
    FOLDER,
    NO_METER,
    batch_bench,
    bench,
    deit_base_layers,
    finetune,
    layer,
    measured_bench,
    profile,
    prune,
    traced_bench,
)
from made_times import NVML, energy_run
from shown import HOSTILE, Page, page, shown, words

from lpvit_cli.measure.energy.run import EnergyRun
from lpvit_cli.measure.profile import SparseProfile
from lpvit_cli.report import html
from lpvit_cli.report.pictures import blocks_picture, latency_picture
from lpvit_cli.report.schema import ProfileReport


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without matplotlib."""
    monkeypatch.setattr(html, "find_spec", lambda name: None)


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = page(tmp_path, measured_bench(), finetuned=finetune())
    made = Page(text)
    links = [v for _, attributes in made.tags for k, v in attributes.items() if k in ("src", "href", "xlink:href", "srcset")]
    assert links
    assert all(link is not None and link.startswith(("data:", "#")) for link in links)
    assert made.count("script") == 0
    assert "@import" not in text
    assert re.findall(r"url\((?!#)[^)]*\)", text) == []


def test_the_page_has_its_verdicts_and_a_picture_of_each_batch_and_of_the_blocks(tmp_path: Path) -> None:
    report = bench()
    text = page(tmp_path, report)
    assert text.count("<svg") == text.count("</svg>") == 3
    assert all(f'<p class="verdict">{batch.verdict}</p>' in text for batch in report.batches)
    assert "<?xml" not in text
    assert "matplotlib is not installed" not in text


def test_pictures_are_of_their_own_numbers() -> None:
    drawn = latency_picture(batch_bench(64, 5234.56))
    assert drawn.startswith("<svg")
    assert "<!-- Latency, batch 64, float32 -->" in drawn
    assert "<!-- sparse, median 3982.85 ms -->" in drawn
    blocks = blocks_picture(deit_base_layers(2))
    assert "<!-- blocks.1.mlp.fc2 -->" in blocks
    assert blocks.count("<!-- 50% of 1152 blocks -->") == 4


@pytest.mark.usefixtures("no_pictures")
def test_without_matplotlib_the_page_keeps_its_tables_and_says_how_to_get_pictures(tmp_path: Path) -> None:
    text = page(tmp_path, bench(), finetuned=finetune())
    made = Page(text)
    assert made.count("svg") == 0
    assert made.count("table") == 3
    assert "pip install matplotlib" in made.text


@pytest.mark.usefixtures("no_pictures")
def test_the_page_shows_the_numbers_of_the_reports(tmp_path: Path) -> None:
    report = measured_bench()
    rows = [[words(cell) for cell in row] for row in Page(page(tmp_path, report, finetuned=finetune())).rows]
    assert ["", "dense", "pruned, one-shot", "recovered"] in rows
    assert ["top-1", "81.83 %", "74.29 %", "80.47 %"] in rows
    assert ["GFLOPs per image", "35.1277", "17.5638", "17.5638"] in rows
    assert ["MiB on disk", "329.97", "172.62", "172.62"] in rows
    for batch in report.batches:
        for name, timing in batch.timing.subjects.items():
            p, ratio = timing.percentiles, batch.speedup.get(name)
            assert p is not None
            times = [f"{value:.2f}" for value in (p.p10, p.p50, p.p90, p.p95, p.p99)]
            gain = f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "1"
            memory = "not measured" if name == "sparse" else "331"
            numbers = [f"{batch.images_per_second[name]:.0f}", memory, gain, ""]
            assert [name, "float32", str(batch.batch_size), *times, *numbers] in rows
    expected = ["blocks.0.mlp.fc2", "768 x 3072", "64 x 32", "576 of 1152", "50.0 %", "1.23e-05", "464.78", "2061.7"]
    assert expected in rows


@pytest.mark.usefixtures("no_pictures")
def test_the_page_of_a_run_without_recovery_has_no_column_for_it(tmp_path: Path) -> None:
    rows = Page(page(tmp_path, bench())).rows
    assert ["top-1", "81.83 %", "74.29 %"] in rows
    assert "recovered" not in [cell for row in rows for cell in row]


ENERGY = ["J/image", "J/image above idle", "images/J", "average W", "peak W, at least", "J s", "trace J/image", "saving (95 %)"]
NOT = ["not measured"] * 3  # no trace


@pytest.mark.usefixtures("no_pictures")
def test_the_page_shows_measured_energy_with_units_and_source(tmp_path: Path) -> None:
    made = Page(page(tmp_path, measured_bench()))
    rows = made.rows
    for batch, dense, sparse in [
        ("batch 1", ["1.234", "0.9876", "0.8", "412"], ["0.9259", "0.7407", "1.1", "412"]),
        ("batch 128", ["0.2468", "0.1974", "4.1", "412"], ["0.1851", "0.1481", "5.4", "412"]),
    ]:
        start = rows.index([f"{batch}, float32", *ENERGY])
        assert rows[start + 1] == ["dense", *dense, *NOT, "1"]
        assert rows[start + 3] == ["sparse", *sparse, *NOT, "1.33 (1.33-1.33)"]
    traced = Page(page(tmp_path, traced_bench())).rows
    assert ["sparse", "0.9259", "0.7407", "1.1", "412", "472", "0.0437", "0.9351, good", "1.33 (1.33-1.33)"] in traced
    assert f"Measured by {NVML}; idle power 71.5 W" in made.text
    assert "ot measured:" not in made.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("energy", [None, EnergyRun(NVML, reasons=[NO_METER])], ids=["no meter", "died"])
def test_the_page_says_not_measured_and_why(tmp_path: Path, energy: EnergyRun | None) -> None:
    made = Page(page(tmp_path, bench(*(batch_bench(size, 81.37, energy, (NO_METER,)) for size in (1, 64)))))
    assert made.text.count(f"Not measured: {NO_METER}") == 1
    assert not any("J/image" in row for row in made.rows)
    assert "Measured by" not in made.text


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_the_page_says_why_one_of_two_batches_has_no_energy(tmp_path: Path, first: bool) -> None:
    batches = [batch_bench(1, 8.1, energy_run(1.2345)), batch_bench(64, 61.9, None, (DEAD_METER,))]
    made = Page(page(tmp_path, bench(*(batches[::-1] if first else batches))))
    assert ["batch 1, float32", *ENERGY] in made.rows
    assert ["batch 64, float32", *ENERGY] not in made.rows
    assert f"ot measured: {DEAD_METER}" in made.text


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_shows_hostile_names_as_text(tmp_path: Path, name: str) -> None:
    report = bench(
        batch_bench(1, 81.37, reasons=(f"reason {name}",), note=f" verdict {name}"),
        device=f"device {name}",
        notes=[f"note {name}"],
        machine={"cpu": f"cpu {name}"},
        versions={"torch": f"torch {name}"},
    )
    text = page(tmp_path, report, prune(layers=[layer(f"layer {name}", 768, 768)]))
    made = Page(text)
    for place in ("reason", "verdict", "device", "note", "cpu", "torch", "layer"):
        assert f"{place} {name}" in made.text
    assert made.count("script") == 0
    assert made.count("svg") == 2


@pytest.mark.parametrize("metered", [False, True])
def test_a_profile_shows_dense_and_sparse_and_where_they_break_even(metered: bool) -> None:
    text = shown(profile(metered))
    lines = [words(line) for line in text.splitlines()]
    # 5234.5 - 12 * (0.123 + 123.4 + 7.89)
    assert "float32, batch 64: whole model 5234 ms, 3658 ms outside these layers" in words(text)
    assert "12 of 3072x768 7.89 0.789 1.58 3.94 7.89 11.8 15.8" in lines
    assert "12608 rows, blocks 128x32 10.00x 5.00x 2.00x 1.00x 0.67x 0.50x" in lines
    assert "768x768 on 12608 rows, blocks 128x32: sparse never pays, not even with 5 % kept" in lines
    assert "2304x768 on 12608 rows, blocks 128x32: sparse pays even with all blocks kept" in lines
    assert "3072x768 on 12608 rows, blocks 128x32: sparse pays below 50 % kept" in lines
    assert ("12 of 3072x768 316 31.6 63.1 158 316 473 631" in lines) is metered
    assert (f"energy not measured: {NO_METER}" in words(text)) is not metered
    assert (f"energy by {NVML}: whole model 209380 mJ, 146302 mJ outside these layers" in words(text)) is metered
    assert f"profile: {FOLDER}/profile.json" in lines


def test_a_layer_of_few_blocks_leaves_columns_empty() -> None:
    one = profile().profile.layers[0]
    few = SparseProfile(block=(768, 192), kept=[0.25, 0.5, 0.75, 1.0], ms=[0.1, 0.2, 0.3, 0.4], mj=None)
    made = profile().profile.model_copy(update={"layers": [one.model_copy(update={"sparse": [few]})]})
    lines = shown(ProfileReport(device=CPU, profile=made)).splitlines()
    heads, row = (next(line for line in lines if line.startswith(start)) for start in ("out x in", "12 of"))
    assert row.split()[3:] == ["0.123", "0.100", "0.200", "0.300", "0.400"]
    assert row.index("0.100") + len("0.100") == heads.index("25 %") + len("25 %")
