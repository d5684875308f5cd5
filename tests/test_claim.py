"""Opening a run folder: what killed processes have left goes, what can be resumed stays, links and strays are refused."""

from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lpvit_cli import Recipe
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import clear, publish, replace_text, whole
from lpvit_cli.models.tensors import write_tensors
from lpvit_cli.pipeline.record import Begun, Record
from lpvit_cli.pipeline.run import Run
from lpvit_cli.recovery.history import History
from lpvit_cli.stages import run_of

INPUTS = {"finetune.lr": 1e-3, "finetune.rank": [4, 8]}


def make(folder: Path) -> Run:
    return run_of(Recipe.load("digits_vit"), folder)


def opened(folder: Path) -> list[str]:
    """What is there once the folder was opened and nothing was done."""
    with make(folder).open():
        pass
    return sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "recipe.yaml"))


def artefact(folder: Path, name: str = "finetuned") -> Path:
    (folder / name).mkdir(parents=True)
    Record("finetune-lora-ga", "0", {**INPUTS, "versions.torch": "2"}, "now", 1.0, "lpvit", None).save(folder / name)
    return folder / name


def progress(folder: Path, state: bool = True, **inputs: float) -> Path:
    kept = folder / ".finetuned.progress"
    kept.mkdir(parents=True)
    Begun(["finetune.lr", "finetune.rank"], {**INPUTS, **inputs}).save(kept)
    if state:
        (kept / "checkpoint.safetensors").write_text("state")
    return kept


def test_a_kill_before_the_recipe_has_its_name_leaves_a_folder_that_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".recipe.yaml.tmp").write_text("name: dig")
    assert opened(tmp_path) == []
    assert Recipe.load(tmp_path / "recipe.yaml").name == "digits_vit"


def test_leftovers_go_when_the_folder_is_opened(tmp_path: Path) -> None:
    artefact(tmp_path)
    replace_text(tmp_path / "recipe.yaml", make(tmp_path).recipe.to_yaml())
    for name in (
        ".finetuned.partial",
        ".finetuned.old",
        ".pruned.partial",
        ".finetuned.progress-0000",
        "..pruned.old.rubbish-1-2",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".recipe.yaml.tmp-1-2").write_text("name: dig")
    assert opened(tmp_path) == ["finetuned"]


@pytest.mark.parametrize(
    ("state", "made", "other", "stays"),
    [
        (True, False, {}, True),
        (True, True, {}, False),  # killed between publishing and clearing
        (True, True, {"finetune.lr": 2e-3}, True),  # the next one, with other settings
        (False, False, {}, False),
    ],
    ids=["begun", "published", "begun anew", "without a state"],
)
def test_progress_stays_while_it_can_be_resumed(tmp_path: Path, state: bool, made: bool, other: dict, stays: bool) -> None:  # type: ignore[type-arg]
    if made:
        artefact(tmp_path)
    replace_text(tmp_path / "recipe.yaml", make(tmp_path).recipe.to_yaml())
    progress(tmp_path, state, **other)
    assert opened(tmp_path) == [".finetuned.progress"] * stays + ["finetuned"] * made


def test_progress_that_does_not_say_what_it_depends_on_goes(tmp_path: Path) -> None:
    (progress(tmp_path) / "inputs.json").write_text("[" * 100_000)
    replace_text(tmp_path / "recipe.yaml", make(tmp_path).recipe.to_yaml())
    assert opened(tmp_path) == []


NAMES = [".lock", "recipe.yaml", "pruned", ".pruned.partial", ".pruned.old", ".finetuned.progress"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("to", ["file", "folder", "nothing"])
def test_links_are_refused_and_what_they_point_to_stays(tmp_path: Path, name: str, to: str) -> None:
    target, folder = tmp_path / "thesis", tmp_path / "r"
    if to == "file":
        target.write_text("mine")
    elif to == "folder":
        (target / "finetuned").mkdir(parents=True)
    folder.mkdir()
    (folder / name).symlink_to(target / "finetuned" if to == "folder" else target)
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is a link, which a run does not follow"), make(folder).open(overwrite):
            pass
    assert [path.name for path in folder.iterdir()] == [name], "nothing was begun"
    assert to != "file" or target.read_text() == "mine"
    assert to != "folder" or (target / "finetuned").is_dir()
    assert to != "nothing" or not target.exists()


@pytest.mark.parametrize("name", NAMES)
def test_strays_with_the_name_of_something_else_are_refused(tmp_path: Path, name: str) -> None:
    if name in NAMES[:2]:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="is in the way: a run keeps a f"), make(tmp_path).open(overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_link_in_progress_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    kept = progress(tmp_path / "r")
    (kept / "steps").mkdir()
    (kept / "steps" / "history.jsonl").symlink_to(tmp_path / "thesis")
    replace_text(tmp_path / "r" / "recipe.yaml", make(tmp_path).recipe.to_yaml())
    with pytest.raises(UsageError, match=r"history.jsonl: is a link"), make(tmp_path / "r").open():
        pass


def test_temporary_writes_do_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("mine")
    for name in ("report.json", "x.npy", "a.safetensors"):
        (tmp_path / name).symlink_to("thesis")
    replace_text(tmp_path / "report.json", "{}")
    with whole(tmp_path / "x.npy") as place:
        place.write_text("numbers")
    write_tensors(tmp_path / "a.safetensors", {})
    assert (tmp_path / "thesis").read_text() == "mine"
    assert [path for path in tmp_path.iterdir() if path.is_symlink()] == []
    (tmp_path / "history.jsonl").symlink_to("thesis")
    with pytest.raises(OSError, match="symbolic links"):
        History(tmp_path / "history.jsonl").add(step=1)
    assert (tmp_path / "thesis").read_text() == "mine"


def test_a_kill_while_another_run_is_removed_leaves_no_half_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact(tmp_path)
    (tmp_path / "finetuned" / "model.safetensors").write_text("x")
    replace_text(tmp_path / "recipe.yaml", "name: other\n")

    def killed(folder: Path) -> None:
        (folder / "stage.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt), make(tmp_path).open(overwrite=True):
            pass
    with make(tmp_path).open(overwrite=True):
        assert not list(tmp_path.glob("*finetuned*"))


def test_the_owner_is_asked_again_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def faster(lock: int, how: int) -> None:  # between the first look and the lock, another run came and went
        replace_text(tmp_path / "recipe.yaml", "name: other\n")

    monkeypatch.setattr(fcntl, "flock", faster)
    with pytest.raises(UsageError, match="holds a run of recipe 'other'"), make(tmp_path).open():
        pass
    assert (tmp_path / "recipe.yaml").read_text() == "name: other\n"


def test_a_recipe_that_is_no_text_belongs_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not empty and not a run folder"), make(tmp_path).open():
        pass


@pytest.mark.parametrize("text", ["5", "{}", "[" * 100_000, '{"half', "\xff", '{"inputs": 5}'])
def test_damaged_records_are_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "stage.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EnvironmentFault, match="unreadable") as caught:
        Record.load(tmp_path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_an_old_folder_that_cannot_go_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)

    def read_only(folder: Path) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("shutil.rmtree", read_only)
    publish(tmp_path / "work", tmp_path / "target")
    assert (tmp_path / "target" / "which").read_text() == "work"


def test_a_link_to_nothing_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "r").symlink_to("nowhere")
    with pytest.raises(UsageError, match="is a link to nothing"), make(tmp_path / "r").open():
        pass


def test_an_artefact_that_is_a_link_may_be_read_and_is_not_written(tmp_path: Path) -> None:
    theirs, run = artefact(tmp_path / "theirs", "calibration"), make(tmp_path / "r")
    (tmp_path / "r").mkdir()
    replace_text(tmp_path / "r" / "recipe.yaml", run.recipe.to_yaml())
    (tmp_path / "r" / "calibration").symlink_to(theirs)
    assert opened(tmp_path / "r") == ["calibration"]
    stage = next(stage for stage in run.stages if stage.folder == "calibration")
    with pytest.raises(UsageError, match="is a link, which a run does not follow") as caught, run.open():
        run.execute(stage, lambda *_: None)
    assert "cp -rL" in caught.value.hint
    assert [path.name for path in theirs.iterdir()] == ["stage.json"]


def busy(path: object, *given: object, **named: object) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))


def test_what_cannot_be_removed_is_out_of_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, which keeps files that somebody has open."""
    artefact(tmp_path)
    replace_text(tmp_path / "recipe.yaml", make(tmp_path).recipe.to_yaml())
    for name in (".finetuned.old", ".finetuned.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".nfs0001").touch()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        with make(tmp_path).open():
            clear(tmp_path / ".finetuned.partial")
            (tmp_path / ".finetuned.partial").mkdir()
            (tmp_path / ".finetuned.partial" / "new").touch()
            publish(tmp_path / ".finetuned.partial", tmp_path / "finetuned")
    assert (tmp_path / "finetuned" / "new").exists()
    (tmp_path / "finetuned" / "stage.json").write_text("{}")
    assert opened(tmp_path) == ["finetuned"], "all the rest goes when nobody has it open"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning, match="has no locks"):
        assert opened(tmp_path) == []


def test_line_ends_of_windows_change_no_owner(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: digits_vit\r\nseed: 0\r\n")
    assert opened(tmp_path) == []


def test_two_writers_of_one_name_leave_a_whole_file(tmp_path: Path) -> None:
    path, text = tmp_path / "shared.json", "x" * 100_000
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: replace_text(path, text), range(40)))  # raises what a writer raises
    assert path.read_text() == text
    assert [found.name for found in tmp_path.iterdir()] == ["shared.json"]


def test_records_are_json_that_older_versions_read(tmp_path: Path) -> None:
    content = json.loads((artefact(tmp_path) / "stage.json").read_text())
    assert {"stage", "fingerprint", "reads", "inputs", "created", "duration_s", "command", "git_commit", "device"} == set(
        content
    )
