"""Run folders: resume by what changed, atomic publication, refusal of foreign folders, disks that fail."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lpvit_cli import Recipe
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.pipeline import run as run_module
from lpvit_cli.pipeline.run import Run
from lpvit_cli.pipeline.stage import Stage
from lpvit_cli.recipe.section import note_reads
from lpvit_cli.report.schema import CalibrateReport
from lpvit_cli.stages import BENCH, CALIBRATE, FINETUNE, PRUNE, run_of

READS = {  # what each stage reads at least
    "calibration": ["model.name", "model.weights", "data.root", "calibrate.images", "prune.layers.include"],
    "pruned": ["prune.min_keep", "prune.budget"],
    "finetuned": ["finetune.rank", "finetune.lr"],
    "bench": ["bench.rounds"],
}


def make(folder: Path, *overrides: str) -> Run:
    return run_of(Recipe.load("digits_vit", overrides), folder)


def report() -> CalibrateReport:
    return CalibrateReport(device="test", images=1, gradient="logits", layers=1, statistics_bytes=1)


@pytest.fixture
def work_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every stage read its keys of the recipe and do `body(work)` instead of its real work."""

    def use(body: Callable[[Path], object]) -> None:
        def function(recipe: Recipe, run: Run, work: Path, progress: object) -> CalibrateReport:
            note_reads(READS[work.name.split(".")[1]])
            (work / "data").write_text("half")
            body(work)
            return report()

        monkeypatch.setattr(Stage, "function", property(lambda self: function))

    return use


def quiet(*args: object) -> None:
    pass


def test_published_artefact_is_skipped_until_its_inputs_change(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        assert run.changes(CALIBRATE) is None
        run.execute(CALIBRATE, quiet)
        assert run.changes(CALIBRATE) == []
        run.execute(PRUNE, quiet)
        assert run.changes(PRUNE) == []
    other = make(tmp_path / "r", "prune.min_keep=0.2")
    assert other.changes(CALIBRATE) == []
    assert other.changes(PRUNE) == ["prune.min_keep: 0.0 -> 0.2"]
    earlier = make(tmp_path / "r", "calibrate.images=7")
    assert earlier.changes(CALIBRATE) == ["calibrate.images: 1437 -> 7"]
    assert earlier.changes(PRUNE) == ["calibration: calibrate.images: 1437 -> 7"]
    with pytest.raises(UsageError, match=r"made with other settings \(calibrate.images: 1437 -> 7\)"):
        earlier.artefact(CALIBRATE)


def test_a_new_calibration_makes_the_pruned_model_stale(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
        run.execute(PRUNE, quiet)
    changed = make(tmp_path / "r", "calibrate.images=7")
    with changed.open():
        changed.execute(CALIBRATE, quiet)
        (stale,) = changed.changes(PRUNE) or [""]
        assert stale == "calibration was made again"


def test_changed_weights_are_noticed(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    run = make(tmp_path / "r", f"model.weights={weights}")
    with run.open():
        run.execute(CALIBRATE, quiet)
    weights.write_bytes(b"two")
    (change,) = make(tmp_path / "r", f"model.weights={weights}").changes(CALIBRATE) or [""]
    assert change.startswith("model.weights (content): ")


def test_missing_stage_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        make(tmp_path / "r").artefact(CALIBRATE)
    assert caught.value.hint == f"run: lpvit calibrate digits_vit --output {tmp_path / 'r'}"


def test_bench_takes_the_recovered_model_once_there_is_one(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        for stage in (CALIBRATE, PRUNE):
            run.execute(stage, quiet)
        assert run.model_artefact(BENCH).name == "pruned"
        run.execute(BENCH, quiet)
        run.execute(FINETUNE, quiet)
        assert run.model_artefact(BENCH).name == "finetuned"
        assert run.changes(BENCH), "the bench of the pruned model does not hold for the recovered one"
    assert make(tmp_path / "r", "finetune=null").model_artefact(BENCH).name == "pruned"
    with pytest.raises(UsageError, match="finetune.rank: 16 -> 4"):
        make(tmp_path / "r", "finetune.rank=4").model_artefact(BENCH)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("bug"), UsageError("known")])
def test_failure_leaves_nothing_half_written(tmp_path: Path, work_of: Callable[..., None], failure: BaseException) -> None:
    def fail(work: Path) -> None:
        raise failure

    work_of(fail)
    run = make(tmp_path / "r")
    with pytest.raises(type(failure)), run.open():
        run.execute(CALIBRATE, quiet)
    assert sorted(p.name for p in run.folder.iterdir()) == [".lock", "recipe.yaml"]


def test_failure_keeps_the_earlier_artefact(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: (work / "data").write_text("first"))
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)

    def fail(work: Path) -> None:
        raise KeyboardInterrupt

    work_of(fail)
    with pytest.raises(KeyboardInterrupt), run.open():
        run.execute(CALIBRATE, quiet, resume=False)
    assert (run.folder / "calibration" / "data").read_text() == "first"
    assert run.changes(CALIBRATE) == []


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        killed = run.folder / ".calibration.partial"
        killed.mkdir()
        (killed / "half").write_text("x")
        run.execute(CALIBRATE, quiet)
        assert sorted(p.name for p in (run.folder / "calibration").iterdir()) == ["data", "report.json", "stage.json"]
        assert not killed.exists()


def test_progress_survives_only_for_the_same_inputs(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
        kept = run.progress_folder(PRUNE)
        seen = []
        work_of(lambda work: seen.extend(p.name for p in run.folder.glob(".pruned.progress*")))
        for resume in (True, False):
            run.progress_folder(PRUNE)
            run.execute(PRUNE, quiet, resume=resume)
    assert seen == [kept.name]
    assert not kept.exists()


def test_folder_of_another_recipe_is_refused_and_taken_over_on_request(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
    other = run_of(Recipe.load("deit_small_50"), tmp_path / "r")
    with pytest.raises(UsageError, match="holds a run of recipe 'digits_vit', not 'deit_small_50'"), other.open():
        pass
    assert (tmp_path / "r" / "calibration").is_dir()
    with other.open(overwrite=True):
        assert not (tmp_path / "r" / "calibration").exists()


def test_a_folder_that_is_no_run_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and not a run folder"), make(tmp_path).open():
        pass
    with make(tmp_path).open(overwrite=True):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), make(tmp_path / "file").open():
        pass


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        make(tmp_path / "r").open(),
        pytest.raises(EnvironmentFault, match="another lpvit is working"),
        make(tmp_path / "r").open(),
    ):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_full_and_read_only_disks(tmp_path: Path, work_of: Callable[..., None], code: int) -> None:
    def fail(work: Path) -> None:
        raise OSError(code, os.strerror(code))

    work_of(fail)
    run = make(tmp_path / "r")
    with pytest.raises(EnvironmentFault, match=os.strerror(code)) as caught, run.open():
        run.execute(CALIBRATE, quiet)
    assert caught.value.exit_code == 3
    assert not (run.folder / "calibration").exists()


def test_folder_that_cannot_be_created() -> None:
    with pytest.raises(EnvironmentFault, match="cannot create"), make(Path("/proc/lpvit")).open():
        pass


def test_damaged_stage_record(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
    record = json.loads((run.folder / "calibration" / "stage.json").read_text())
    assert record["inputs"]["calibrate.images"] == 1437
    assert record["stage"] == "calibrate"
    (run.folder / "calibration" / "stage.json").write_text('{"half')
    with pytest.raises(EnvironmentFault, match="unreadable"):
        run.changes(CALIBRATE)


def test_another_version_of_torch_makes_an_artefact_stale(
    tmp_path: Path, work_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
    monkeypatch.setattr(run_module, "version", lambda package: "99")
    stale = [change for change in run.changes(CALIBRATE) or [] if not change.startswith("versions.lpvit")]
    assert [change.split(":")[0] for change in stale] == ["versions.timm", "versions.torch"]
    assert all(change.endswith("-> 99") for change in stale)


def test_a_stage_does_not_start_before_the_one_it_reads(tmp_path: Path, work_of: Callable[..., None]) -> None:
    started: list[Path] = []
    work_of(started.append)
    run = make(tmp_path / "r")
    with run.open(), pytest.raises(UsageError, match="nothing from `calibrate` there yet"):
        run.execute(PRUNE, quiet)
    assert started == []


def test_a_folder_that_was_only_just_claimed_can_be_claimed_again(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").write_text("")
    with make(tmp_path / "r").open():
        assert (tmp_path / "r" / "recipe.yaml").is_file()


@pytest.mark.parametrize("name", ["123", "yes", "1e3", "a-b.c"])
def test_names_that_yaml_quotes_are_recognised(tmp_path: Path, name: str) -> None:
    run = make(tmp_path / "r", f"name='{name}'")
    with run.open():
        pass
    with make(tmp_path / "r", f"name='{name}'").open():
        assert Recipe.load(run.folder / "recipe.yaml").name == name


def test_taking_a_folder_over_removes_the_progress_of_its_former_run(tmp_path: Path) -> None:
    with make(tmp_path / "r").open():
        (tmp_path / "r" / ".finetuned.progress-0000").mkdir()
    with run_of(Recipe.load("deit_small_50"), tmp_path / "r").open(overwrite=True):
        assert not (tmp_path / "r" / ".finetuned.progress-0000").exists()


def test_another_pruned_model_makes_the_recovered_one_stale(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        for stage in (CALIBRATE, PRUNE, FINETUNE):
            run.execute(stage, quiet)
    assert run.changes(FINETUNE) == []
    assert make(tmp_path / "r", "prune.min_keep=0.2").changes(FINETUNE) == ["pruned: prune.min_keep: 0.0 -> 0.2"]


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(run_module.subprocess, "run", absent)
    assert run_module.git_commit() is None


def test_taking_over_spares_folders_lpvit_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").write_text("mine")
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "stage.json").write_text("{}")
    with pytest.raises(UsageError, match="export: is in the way and not made by lpvit"), make(tmp_path).open(overwrite=True):
        pass
    assert (tmp_path / "export" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "calibration").is_dir(), "refused before anything is removed"


def test_taking_over_waits_for_the_lock(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run, other = make(tmp_path / "r"), run_of(Recipe.load("deit_small_50"), tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
        with pytest.raises(EnvironmentFault, match="another lpvit is working"), other.open(overwrite=True):
            pass
        assert run.changes(CALIBRATE) == []


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, work_of: Callable[..., None]) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r")
    with run.open():
        run.execute(CALIBRATE, quiet)
    (run.folder / "calibration").rename(run.folder / ".calibration.old")
    with run.open():
        assert run.changes(CALIBRATE) == []


def test_a_bench_does_not_hold_on_another_machine(
    tmp_path: Path, work_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    work_of(lambda work: None)
    run = make(tmp_path / "r", "finetune=null")
    with run.open():
        for stage in (CALIBRATE, PRUNE, BENCH):
            run.execute(stage, quiet)
    monkeypatch.setattr("lpvit_cli.devices.describe_device", lambda device: "a faster one")
    (change,) = run.changes(BENCH) or [""]
    assert change.endswith("-> a faster one")
    assert run.changes(PRUNE) == []
