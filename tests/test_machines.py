"""Machines that lack something: a home folder, shared memory, a folder that can be written."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Result
from lpvit_kernels.home import cache_folder, private_folder

from lpvit_cli import machine
from lpvit_cli.commands import doctor
from lpvit_cli.data.batches import Batches
from lpvit_cli.data.builtin import SyntheticReader
from lpvit_cli.errors import EnvironmentFault

HERE = os.getpid()


def nobody(*_: object) -> str:
    raise KeyError("uid not found")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process whose uid has no account, as by docker --user."""
    for name in ("HOME", "LPVIT_CACHE", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.path.expanduser", lambda path: path.replace("~", os.environ.get("HOME", "~")))
    monkeypatch.setattr("getpass.getuser", lambda: os.environ.get("USER") or nobody())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "_temporary_home", None)
    private_folder.cache_clear()


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / f"lpvit-{os.getuid()}"
    assert cache_folder() == own / ".cache" / "lpvit", "the kernels alone use the same"
    machine.settle()
    assert os.environ["HOME"] == str(own)
    assert os.environ["USER"] == f"uid{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == own / ".cache" / "lpvit"
    finding = doctor._cache()
    assert (finding.ok, finding.detail) == (False, f"{cache_folder()}: temporary, for want of a home folder")
    assert "HOME" in finding.remedy
    monkeypatch.delenv("HOME")
    own.chmod(0o777)
    private_folder.cache_clear()
    assert cache_folder() == cache_folder(), "one folder in one process"
    machine.settle()
    assert os.environ["HOME"] != str(own), "others may write there"
    assert Path(os.environ["HOME"]).parent == tmp_path


@pytest.mark.usefixtures("homeless")
def test_a_home_folder_that_is_not_there_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    own = tmp_path / f"lpvit-{os.getuid()}"
    assert cache_folder() == own / ".cache" / "lpvit"
    machine.settle()
    assert os.environ["HOME"] == str(own)


@pytest.mark.usefixtures("homeless")
def test_a_read_only_home_that_holds_caches_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    machine.settle()
    assert cache_folder() == tmp_path / "home" / ".cache" / "lpvit"


def test_a_home_folder_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.settle()
    assert os.environ["HOME"] == str(tmp_path)
    assert doctor._cache().ok


def test_doctor_knows_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._shared_memory(str(tmp_path / "none")) == []
    monkeypatch.setattr(doctor, "ENOUGH_SHARED_MEMORY", 2**62)
    (finding,) = doctor._shared_memory(str(tmp_path))
    assert not finding.ok
    assert "--shm-size=" in finding.remedy
    assert "data.workers=0" in finding.remedy


@pytest.mark.parametrize(
    ("flags", "lacks", "int8"),
    [
        ("fpu avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_int8", "", True),
        ("fpu avx2 avx_vnni", "lacks AVX-512, AMX, bf16", True),
        ("fpu avx2", "lacks AVX-512, VNNI, AMX, bf16", False),
        (None, "not known", True),
    ],
)
def test_doctor_tells_what_targets_lack(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, lacks: str, int8: bool
) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("model name : made up\n" + (f"vmx flags : avx512f\nflags\t\t: {flags}\n" if flags else ""))
    monkeypatch.setattr(machine, "CPU_INFO", told)
    monkeypatch.setattr(doctor, "installed", lambda package: None if package == "openvino" else "1.0")
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    findings = {finding.what: finding for finding in doctor._targets(3)}
    assert machine.cpu_name() == "made up"
    assert findings["CPU features"].detail.endswith(lacks or "bf16")
    assert findings["CPU features"].ok == ("lacks" not in lacks)
    assert "3 threads" in findings["target torch"].detail
    onnx, openvino = findings["target onnxruntime"], findings["target openvino"]
    assert (onnx.ok, "lacks VNNI" in onnx.detail, "6 threads" in onnx.detail) == (int8, not int8, True)
    assert "compare its accuracy" in onnx.remedy or int8
    assert (openvino.ok, openvino.remedy) == (False, "pip install openvino")


def silent(_: Any) -> torch.Tensor:
    time.sleep(2)
    return torch.zeros(1)


def dies(_: Any) -> torch.Tensor:
    assert os.getpid() != HERE
    os.kill(os.getpid(), signal.SIGKILL)
    return torch.zeros(1)


@pytest.mark.parametrize("transform", [silent, dies])
def test_workers_that_say_nothing_or_die(transform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpvit_cli.data.batches.SILENCE", 1)
    with pytest.raises(
        EnvironmentFault, match="data.workers: a process that decodes images has died or says nothing"
    ) as caught:
        list(Batches(SyntheticReader(1, 2, (8, 8), 3), transform, batch_size=1, workers=1))
    assert "--set data.workers=0" in caught.value.hint
    assert "--shm-size" in caught.value.hint


def test_a_worker_that_dies_while_the_program_is_elsewhere(
    lpvit: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises at once, wherever that is."""

    def elsewhere() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")

    monkeypatch.setattr("lpvit_cli.commands.doctor.examine", elsewhere)
    result = lpvit("doctor")
    assert result.code == 3
    assert "killed by signal: Bus error" in result.err
    assert "Traceback" not in result.err


def test_a_name_that_no_file_can_have(lpvit: Callable[..., Result]) -> None:
    for command in (["evaluate", "x" * 5000], ["predict", "x" * 5000, "a.png"], ["calibrate", "digits_vit", "-o", "x" * 5000]):
        result = lpvit(*command)
        assert result.code in (2, 3)
        assert "Traceback" not in result.err
        assert len(result.err) < 2500
