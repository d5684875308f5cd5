"""What a call holds at most: real allocations on this CPU, and a GPU's allocator that only pretends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lpvit_cli.measure import memory
from lpvit_cli.measure.memory import peak_bytes

CPU = torch.device("cpu")
MIB = 2**20


def test_a_call_is_charged_for_what_it_holds_at_a_time() -> None:
    def together() -> None:
        held = [torch.ones(32 * MIB // 4) for _ in range(3)]
        del held

    def one_after_another() -> None:
        for _ in range(3):
            torch.ones(32 * MIB // 4)

    for _ in range(2):  # what was freed before does not hide it
        assert peak_bytes(together, CPU) == pytest.approx(96 * MIB, abs=6 * MIB)
        assert peak_bytes(one_after_another, CPU) == pytest.approx(32 * MIB, abs=6 * MIB)
    assert peak_bytes(lambda: None, CPU) == pytest.approx(0, abs=MIB)


def test_small_pieces_that_the_c_library_kept_do_not_hide_what_is_needed() -> None:
    pinned: list[torch.Tensor] = []  # between the pieces: the heap cannot shrink by itself

    def many() -> None:
        held = []
        for _ in range(512):  # 32 MiB in pieces that go onto the heap
            held.append(torch.ones(16 * 1024))
            pinned.append(torch.ones(64))

    many()
    assert peak_bytes(many, CPU) == pytest.approx(32 * MIB, abs=6 * MIB)


def test_where_the_system_does_not_tell_there_is_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "absent")
    assert peak_bytes(lambda: None, CPU) is None


def test_on_a_gpu_it_is_the_allocator_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes are there before; the call holds 70 more at a time and leaves 20; an earlier peak was 1000."""
    state = {"now": 100, "peak": 1000}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=state["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    assert peak_bytes(lambda: state.update(peak=170, now=120), torch.device("cuda")) == 70
