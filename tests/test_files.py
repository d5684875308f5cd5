"""Files and folders are replaced as a whole and known by their content; faults of the disk are told."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import content_id, digest, publish, replace_text, require_temporary_folder, writing
from lpvit_cli.pipeline import run as run_module


def test_content_id_follows_names_below_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("x")
    first = content_id(tmp_path)
    (tmp_path / "a" / "2.png").write_text("x")
    second = content_id(tmp_path)
    assert second != first
    (tmp_path / "a" / "2.png").rename(tmp_path / "2.png")
    assert content_id(tmp_path) != second, "an image that changes its class changes the data"
    assert content_id(tmp_path / "absent") is None
    assert run_module.git_commit() is None or len(run_module.git_commit() or "") == 40


def test_content_id_does_not_follow_the_order_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).write_text("x")
    here, walk = content_id(tmp_path), os.walk
    monkeypatch.setattr(os, "walk", lambda path: [(top, dirs, sorted(names, reverse=True)) for top, dirs, names in walk(path)])
    reverse = content_id(tmp_path)
    monkeypatch.setattr(os, "walk", lambda path: [(top, dirs, sorted(names)) for top, dirs, names in walk(path)])
    assert here == reverse == content_id(tmp_path)


def test_digest_does_not_follow_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_publishing_drops_the_old_folder_only_once_the_new_one_stands(tmp_path: Path) -> None:
    target, work = tmp_path / "pruned", tmp_path / ".pruned.partial"
    for folder, text in ((target, "old"), (work, "new")):
        folder.mkdir()
        (folder / "data").write_text(text)
    publish(work, target)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    assert (target / "data").read_text() == "new"
    with pytest.raises(FileNotFoundError):
        publish(work, target)
    assert [path.read_text() for path in tmp_path.glob("*/data")] == ["new"]


def test_a_file_that_cannot_be_replaced_leaves_no_copy_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_text(tmp_path / "report.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOENT, "No such file"), FileNotFoundError),
        (OSError(errno.EACCES, "Permission denied"), EnvironmentFault),
        (OSError(errno.EBUSY, "Device or resource busy"), EnvironmentFault),
        (SafetensorError("I/O error: No space left on device (os error 28)"), EnvironmentFault),
        (SafetensorError("I/O error: No such file (os error 2)"), SafetensorError),
        (SafetensorError("header too large"), SafetensorError),
    ],
    ids=["missing file", "permission", "in use", "disk full in safetensors", "missing file in safetensors", "damaged tensors"],
)
def test_only_faults_of_the_disk_are_put_down_to_the_disk(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised), writing(Path("runs/a")):
        raise error


def test_only_a_full_disk_is_said_to_be_full() -> None:
    for code, hint in ((errno.ENOSPC, "free space"), (errno.ENOTEMPTY, "look what lies there"), (errno.ESTALE, "mount")):
        with pytest.raises(EnvironmentFault) as caught, writing(Path("runs/a")):
            raise OSError(code, os.strerror(code))
        assert hint in caught.value.hint
        assert ("space" in caught.value.hint) == (code == errno.ENOSPC)


def test_no_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    require_temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile._os, "open", full)  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFault, match="no folder for temporary files"):
        require_temporary_folder()
