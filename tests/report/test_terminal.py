"""Reports made by hand: what the terminal shows of them, and that nothing is cut or invented."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from made import (
    ALL,
    CPU,
    DEAD_METER,
    FOLDER,
    NO_METER,
    batch_bench,
    bench,
    calibrate,
    compared,
    deit_base_layers,
    evaluate,
    export,
    finetune,
    gradual,
    measured_bench,
    predict,
    prediction,
    prune,
    replace_timing,
    sweep,
    traced_bench,
    tuned,
)
from made_times import NVML, averaged, energy_run
from shown import HOSTILE, Page, page, printed, shown, words

from lpvit_cli.commands.doctor import Finding
from lpvit_cli.measure.energy.run import EnergyRun
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.numbers import giga, three_digits
from lpvit_cli.recipe.measure import SubjectName
from lpvit_cli.report.bench_csv import write_csv
from lpvit_cli.report.pictures import sweep_picture
from lpvit_cli.report.schema import BenchReport
from lpvit_cli.report.terminal import render
from lpvit_cli.report.terminal.run import summary
from lpvit_cli.report.terminal.tools import findings_table


@pytest.mark.parametrize("kind", ALL)
def test_nothing_is_wider_than_80_columns_or_cut(kind: str) -> None:
    text = shown(ALL[kind]())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text


def test_every_layer_of_deit_base_has_a_whole_row() -> None:
    rows = [line.split() for line in shown(prune()).splitlines() if line.startswith("blocks.")]
    assert [row[0] for row in rows] == [layer.name for layer in deit_base_layers()]
    assert rows[-1] == ["blocks.11.mlp.fc2", "576/1152", "50.0", "%", "1.2e-05", "0.46", "G", "2061.7"]


@pytest.mark.parametrize(
    ("flops", "text"), [(17_563_828_224, "17.56 G"), (100_000_000, "0.10 G"), (99_940_000, "99.9 M"), (12_345, "0.0 M")]
)
def test_flops_have_a_unit_that_fits_them(flops: int, text: str) -> None:
    assert giga(flops) == text


def test_calibration_shows_what_was_gathered() -> None:
    expected = "calibrated 48 layers on 1024 images (gradient: empirical), 2.5 MiB of statistics in"
    assert words(shown(calibrate())) == f"{expected} {FOLDER}"


def test_pruning_shows_dense_pruned_and_their_ratio() -> None:
    text = shown(prune())
    lines = [words(line) for line in text.splitlines()]
    assert "pruned by lpvit, blocks of 64x32 (out x in)" in lines
    assert "FLOPs 35.13 G 17.56 G 0.50" in lines
    assert "prunable weights kept 100 % 48.8 % 0.49" in lines
    assert f"predicted uJ/image {48 * 4123.4:.0f} {48 * 2061.7:.0f} 0.50" in lines
    assert "size on disk 330.0 MiB 172.6 MiB 0.52" in lines
    assert "top-1, one-shot 81.83 % 74.29 % -7.54" in lines
    assert f"model folder: {FOLDER}" in lines


def test_a_sweep_shows_a_row_for_every_budget() -> None:
    lines = [words(line) for line in shown(sweep(), Path("runs/a/sweep")).splitlines()]
    assert "0.5 0.49 0.50 0.52 80.12 % -1.71 1.63 (1.58-1.71)" in lines
    assert "0.7 0.49 0.50 0.52 74.29 % -7.54 2.41 (2.33-2.52)" in lines
    assert "dense 1.00 1.00 1.00 81.83 % 1" in lines
    assert lines[0].endswith("speed at batch 8: dense 81.40 ms")
    profiled = [words(line) for line in shown(sweep(profiled=True), Path("runs/a/sweep")).splitlines()]
    assert "0.7 0.49 0.50 0.52 74.29 % -7.54 2.41 (2.33-2.52) 2.33" in profiled


def test_a_sweep_is_drawn_with_its_speed() -> None:
    drawn = sweep_picture(sweep())
    assert "measured, batch 8" in drawn
    assert "predicted" not in drawn
    assert "predicted from the device profile" in sweep_picture(sweep(profiled=True))


def test_a_prediction_shows_what_it_can_and_why_not_the_rest() -> None:
    lines = [words(line) for line in shown(prediction()).splitlines()]
    assert "dense 1.00 35.10 G 330.0 MiB 2345 82.00" in lines
    assert "0.5 0.49 17.60 G 180.0 MiB 1234 41.00 2.00x" in lines
    assert "0.3 0.49 17.60 G 180.0 MiB 1234 - -" in lines
    assert lines[-1] == "not predicted latency: no device profile: lpvit profile deit_base_50"


@pytest.mark.parametrize("width", [80, 120])
def test_tuned_layers_are_readable_on_a_narrow_terminal(width: int) -> None:
    text = shown(tuned(), width=width)
    lines = [words(line) for line in text.splitlines()]
    assert "…" not in text
    assert lines.count("2304x768 in 128x32") == 3
    assert "blocks.0.attn.qkv +11 31 % 12608 forward dense 1.00 80" in lines
    assert "blocks.0.attn.qkv +11 31 % 12608 dx dense 1.00 80" in lines
    assert "blocks.0.attn.qkv +11 31 % 12608 dW gathered - 80" in lines
    assert "dense is the fastest forward for 1 of 2 with removed blocks" in words(text)


def test_recovery_shows_both_accuracies_and_what_was_trained() -> None:
    text = shown(finetune())
    lines = [words(line) for line in text.splitlines()]
    assert "top-1 81.83 % 74.29 % 80.47 % -1.36" in lines
    assert "top-5 95.61 % 91.52 % 94.98 % -0.63" in lines
    trained = "2,654,208 parameters trained (rank 16), 86,567,656 in the model; zero blocks checked"
    assert f"3 epochs, the best is 2; {trained}" in words(text)
    assert "parameters trained, 86,567,656" in words(shown(finetune(method="full", rank=None)))


def test_gradual_pruning_shows_every_step_against_the_dense_model() -> None:
    lines = [words(line) for line in shown(gradual()).splitlines()]
    assert "0.5 0.50 0.50 0.52 61.83 % 81.83 % +0.00" in lines
    assert "0.7 0.30 0.50 0.52 61.33 % 81.33 % -0.50" in lines
    said = words(summary("deit_base_50", {"gradual": gradual(), "bench": bench()}, Path("runs/a")).plain)
    assert "top-1 81.33 % (dense 81.83 %)" in said


def test_bench_shows_verdicts_first_then_every_subject_of_every_batch() -> None:
    report = bench()
    lines = [words(line) for line in shown(report, width=120).splitlines()]
    assert lines[:2] == [batch.verdict for batch in report.batches]
    assert f"finetuned on {CPU}, float32" in lines
    for batch in report.batches:
        expected = [f"batch {batch.batch_size}"]
        for name, timing in batch.timing.subjects.items():
            p, ratio = timing.percentiles, batch.speedup.get(name)
            assert p is not None
            gain = f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "1"
            times = " ".join(three_digits(value) for value in (p.p50, p.p90, p.p99))
            memory = "-" if name == "sparse" else "331"
            expected.append(f"{name} {times} {three_digits(batch.images_per_second[name])} {memory} {gain}")
        start = lines.index(expected[0])
        assert lines[start : start + 4] == expected
    assert f"report: {FOLDER}/report.html" in lines


def test_the_first_line_of_bench_is_the_verdict_that_helps(tmp_path: Path) -> None:
    slow = batch_bench(1, 81.37).model_copy(update={"speedup": {"sparse": Ratio(0.9, 0.8, 0.95)}, "verdict": "batch 1: slower"})
    fast = batch_bench(64, 5234.56)
    lines = shown(bench(slow, fast), width=120).splitlines()
    assert lines[:2] == [fast.verdict, "batch 1: slower"]
    assert re.findall('<p class="verdict">(.*)</p>', page(tmp_path, bench(slow, fast))) == lines[:2]
    slower = fast.model_copy(update={"speedup": slow.speedup, "verdict": "batch 64: slower"})
    lines = shown(bench(slow, slower)).splitlines()
    assert lines[:3] == [
        "the pruned model is not faster at any batch measured: 1, 64",
        "batch 1: slower",
        "batch 64: slower",
    ]


def of_subjects(report: BenchReport, names: tuple[str, ...]) -> BenchReport:
    """The report's batches with the masked-dense subject's numbers under each of `names`, dense beside them."""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: values["dense" if name == "dense" else "masked-dense"] for name in names if name != "dense" or name in values
        }

    batches = [
        batch.model_copy(
            update={
                "timing": replace(batch.timing, subjects=renamed(batch.timing.subjects)),
                "energy": batch.energy and replace(batch.energy, subjects=renamed(batch.energy.subjects)),
                "speedup": renamed(batch.speedup),
                "images_per_second": renamed(batch.images_per_second),
                "peak_memory_bytes": dict.fromkeys(names, 10240 * 2**20),
                "subject": names[-1],
            }
        )
        for batch in report.batches
    ]
    return report.model_copy(update={"batches": batches})


@pytest.mark.parametrize(
    ("names", "speedup"),
    [
        (("dense", "masked-dense", "sparse", "dense-graph", "sparse-graph"), 12.3),
        (("dense-onnx", "onnx"), 12.3),
        (("dense", "dense-compiled", "masked-dense-compiled", "sparse-compiled"), 12.3),
        (get_args(SubjectName), 1.23),
    ],
    ids=["default", "onnxruntime", "compiled", "all"],
)
def test_no_name_of_a_subject_breaks_in_80_columns(names: tuple[str, ...], speedup: float) -> None:
    """Seconds a call, and five digits of images a second and of MiB: as wide as numbers get."""
    with_dense = names if "dense" in names else ("dense", *names)
    wide = [batch_bench(size, ms, energy_run(0.001234)) for size, ms in ((1, 81.37), (1024, 52345.6))]
    wide = [one.model_copy(update={"speedup": dict.fromkeys(one.speedup, Ratio(speedup, speedup, speedup))}) for one in wide]
    report = of_subjects(bench(*wide), with_dense)
    shown_names = [line.split()[0] for line in shown(report).splitlines() if line.strip()]
    for name in with_dense:
        assert shown_names.count(name) == 4, f"{name}: whole, once a batch, with its time and with its energy"
    assert max(map(len, shown(report).splitlines())) <= 80
    gate = compared().model_copy(
        update={"changes": [c.model_copy(update={"subject": n}) for n in names for c in compared().changes]}
    )
    shown_names = [line.split()[0] for line in shown(gate).splitlines() if line.strip()]
    assert [shown_names.count(name) for name in names] == [2] * len(names)


def test_percentiles_that_nobody_knows_are_dashes_and_the_rest_is_there(tmp_path: Path) -> None:
    batch = replace_timing(batch_bench(1, 0.0123), sparse=averaged(0.009225))
    line = next(line for line in shown(bench(batch)).splitlines() if line.startswith("sparse "))
    assert line.split() == ["sparse", "-", "-", "-", f"{batch.images_per_second['sparse']:.0f}", "-", "1.33", "(1.33-1.33)"]
    (row,) = [row for row in Page(page(tmp_path, bench(batch))).rows if row[0] == "sparse" and row[1] == "float32"]
    assert [words(cell) for cell in row[3:8]] == ["-"] * 5
    write_csv(tmp_path / "report.csv", bench(batch))
    dense, _, sparse = csv.DictReader((tmp_path / "report.csv").open())
    columns = [f"p{which}_ms" for which in (10, 50, 90, 95, 99)]
    assert [sparse[column] for column in columns] == ["-"] * 5
    p = batch.timing.subjects["dense"].percentiles
    assert p is not None
    assert [float(dense[column]) for column in columns] == [p.p10, p.p50, p.p90, p.p95, p.p99]
    assert float(sparse["median_ms"]) == batch.timing.subjects["sparse"].median_ms
    stored = json.loads(bench(batch).model_dump_json())["batches"][0]["timing"]["subjects"]["sparse"]
    assert stored["percentiles"] is None
    assert stored["quantiles_ms"] is None


def test_the_csv_has_the_energy_that_the_terminal_leaves_out(tmp_path: Path) -> None:
    write_csv(tmp_path / "report.csv", traced_bench())
    energy = traced_bench().batches[0].energy
    assert energy is not None
    for row in csv.DictReader((tmp_path / "report.csv").open()):
        one = energy.subjects[row["subject"]]
        told = [float(row[key]) for key in ("images_per_joule", "peak_w", "energy_delay_js")]
        assert told == [one.images_per_joule, one.peak_w, one.energy_delay_js]


def test_a_report_of_bench_from_before_single_calls_can_still_be_compared() -> None:
    """Version 2 without what it gained."""
    content = json.loads(bench().model_dump_json())
    for batch in content["batches"]:
        for timing in batch["timing"]["subjects"].values():
            del timing["quantiles_ms"]
    timing = BenchReport.model_validate(content).batches[0].timing.subjects["dense"]
    assert timing.median_ms == bench().batches[0].timing.subjects["dense"].median_ms


def test_measured_energy_is_shown_with_its_units_and_source() -> None:
    text = shown(measured_bench(), width=120)
    lines = [words(line) for line in text.splitlines()]
    assert f"energy by {NVML}" in lines
    assert "J/image above idle W peak W saving (95 %)" in lines
    first, second = lines.index("batch 1, float32"), lines.index("batch 128, float32")
    assert lines[first + 1] == "dense 1.234 0.9876 412 - 1"
    assert lines[first + 3] == "sparse 0.9259 0.7407 412 - 1.33 (1.33-1.33)"
    assert lines[second + 3] == "sparse 0.1851 0.1481 412 - 1.33 (1.33-1.33)"
    assert "not measured" not in text


@pytest.mark.parametrize(
    ("energy", "reason"), [(None, NO_METER), (EnergyRun(NVML, reasons=[DEAD_METER]), DEAD_METER)], ids=["no meter", "died"]
)
def test_unmeasured_energy_is_a_reason_told_once_and_never_a_number(energy: EnergyRun | None, reason: str) -> None:
    report = bench(*(batch_bench(size, 81.37, energy, (reason,)) for size in (1, 64)))
    text = words(shown(report))
    assert text.count(f"energy not measured: {reason}") == 1
    assert "J/image" not in text
    assert "energy by" not in text


def test_a_batch_without_energy_does_not_hide_the_other() -> None:
    text = shown(bench(batch_bench(1, 8.1, energy_run(1.2345)), batch_bench(64, 61.9, None, (DEAD_METER,))), width=120)
    lines = [words(line) for line in text.splitlines()]
    assert lines[lines.index("batch 1, float32") + 1] == "dense 1.234 0.9876 412 - 1"
    assert f"energy not measured: {DEAD_METER}" in lines
    assert lines.count("batch 64") == 1  # its latency
    assert "batch 64, float32" not in lines  # and no energy


def test_export_shows_size_speed_forms_and_checks_of_every_file() -> None:
    lines = [words(line) for line in shown(export(), width=160).splitlines()]
    assert lines == [
        f"{FOLDER}/model.onnx: onnx, float32, 99.1 MiB (0.30x dense float32)",
        "model.onnx is 1.20x faster; batch 1, 2 threads",
        "the dense model, free forms",
        "ms the file's speed (95 %) top-1",
        "dense float32 in onnxruntime 3.04 1.50 (1.50-1.50) 81.83 %",
        "dense int8 in onnxruntime 1.52 0.75 (0.75-0.75) 70.12 % loses too much",
        "dense float32 in OpenVINO 2.43 1.20 (1.20-1.20) 81.83 % best",
        "layers by form: 2 rows, 1 dense",
        "against the model, on real images",
        "batch relative error same top-1",
        "1 3.2e-07 100.0 %",
        "8 4.6e-07 87.5 %",
        "top-1 80.47 % (model 80.50 %) on 256 images",
        f"{FOLDER}/model.safetensors: torch, 1.0 MiB",
    ]


@pytest.mark.parametrize(("skipped", "tail"), [(0, ""), (2, ", 2 unreadable images skipped")])
def test_evaluation_is_one_sentence_that_counts_skipped_images(skipped: int, tail: str) -> None:
    text = words(shown(evaluate(skipped_images=skipped)))
    assert text == f"runs/a/pruned: top-1 74.29 %, top-5 91.52 % on 49998 images of folder/imagenet{tail}"


@pytest.mark.parametrize(("available", "images"), [(50_000, "49998"), (None, "49998"), (60_000, "49998 of 60000")])
def test_an_evaluation_of_some_images_says_of_how_many(available: int | None, images: str) -> None:
    text = words(shown(evaluate(skipped_images=2, available=available)))
    assert f"on {images} images of folder/imagenet, 2 unreadable" in text


def test_predictions_show_names_indices_and_probabilities() -> None:
    lines = [words(line) for line in shown(predict(names=["tabby", "Egyptian cat", "tiger cat"])).splitlines()]
    assert lines == ["cat.jpg", "class index probability", "tabby 281 81.2 %", "Egyptian cat 285 12.5 %", "tiger cat 282 6.2 %"]
    assert "281 81.2 %" in [words(line) for line in shown(predict()).splitlines()]


@pytest.mark.parametrize("kind", ALL)
def test_notes_come_last(kind: str) -> None:
    report = ALL[kind]().model_copy(update={"notes": ["resumed after epoch 2", "see [docs]"]})
    assert shown(report).splitlines()[-2:] == ["note: resumed after epoch 2", "note: see [docs]"]


def test_the_summary_of_a_run_quotes_its_last_model_and_every_batch() -> None:
    slow = batch_bench(1, 81.37).model_copy(update={"speedup": {"sparse": Ratio(0.9, 0.8, 0.95)}, "verdict": "batch 1: slower"})
    reports = {"prune": prune(), "finetune-lora-ga": finetune(), "bench": bench(slow, batch_bench(64, 5234.56))}
    text = words(printed(summary("deit_base_50", reports, Path("runs/a"))))
    assert text.startswith(
        "deit_base_50: top-1 80.47 % (dense 81.83 %), 0.50x the FLOPs, 0.52x the size, speed 0.90x at batch 1, "
    )
    assert text.endswith("model: runs/a/finetuned report: runs/a/bench/report.html")
    del reports["finetune-lora-ga"]
    assert "top-1 74.29 %" in words(printed(summary("deit_base_50", reports, Path("runs/a"))))


MARKED: dict[str, Callable[[str], list[Any]]] = {
    "a cell": lambda name: render(predict(names=[name, "b", "c"]), FOLDER),
    "a title": lambda name: render(bench(device=name), FOLDER),
    "a sentence": lambda name: render(evaluate(model=name), FOLDER),
    "a verdict": lambda name: render(bench(batch_bench(1, 81.37, note=name)), FOLDER),
    "a reason": lambda name: render(bench(batch_bench(1, 81.37, reasons=(name,))), FOLDER),
    "a note": lambda name: render(calibrate().model_copy(update={"notes": [name]}), FOLDER),
    "a finding": lambda name: [findings_table([Finding("GPU", False, "none", name)])],
    "a folder": lambda name: render(bench(), Path(name)),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", MARKED)
def test_markup_in_a_name_is_shown_as_it_is(place: str, name: str) -> None:
    assert name in printed(*MARKED[place](name), width=200)
