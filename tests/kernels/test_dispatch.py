"""Choosing a backend: by rule, by what was tuned, and the file that remembers."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import masked, relative
from lpvit_kernels import BlockSparseMatrix, cpu, dense, dispatch, linear, tune, tuned, tuning
from lpvit_kernels.tuned import Choice, Tuned

BLOCK = (32, 16)
SPAWN = get_context("spawn")  # forked, a process whose parent has used OpenMP waits for ever


def matrix(density: float = 0.3) -> BlockSparseMatrix:
    weight, mask = masked((64, 96), BLOCK, density)
    return BlockSparseMatrix.from_dense(weight, BLOCK, mask)


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path))
    tuned.forget()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which `strided` is the fastest: seconds by name."""
    seconds = {"strided": 1.0, "gathered": 2.0, "batched": 3.0, "dense": 4.0}
    monkeypatch.setattr(tuning, "times_in_turns", lambda calls, x: {choice: seconds[choice.backend] for choice in calls})


@pytest.mark.parametrize(
    ("tokens", "density", "rule"),
    [
        (1, 0.3, "batched"),
        (32, 0.3, "batched"),
        (33, 0.3, "gathered"),
        (200, 0.3, "gathered"),
        (200, 1.0, "dense"),
        (1, 1.0, "dense"),
    ],
)
def test_untuned_layers_follow_a_rule(tokens: int, density: float, rule: str) -> None:
    assert dispatch.choose("forward", "auto", torch.empty(tokens, 96), matrix(density)).backend == rule
    assert dispatch.choose("forward", "cpu", torch.empty(tokens, 96), matrix(density)).backend != "dense"


def ran(monkeypatch: pytest.MonkeyPatch, tokens: int, weight: BlockSparseMatrix) -> list[str]:
    """The CPU forms that one call of linear runs."""
    found: list[str] = []
    for name, form in dict(cpu.FORMS).items():
        monkeypatch.setitem(cpu.FORMS, name, lambda *a, name=name, form=form: (found.append(name), form(*a))[1])
    linear(torch.randn(tokens, 96), weight)
    return found


@pytest.mark.usefixtures("slow")
def test_what_was_tuned_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix()
    assert dispatch.choose("forward", "auto", torch.empty(100, 96), weight).backend == "gathered"
    assert tune(weight, 100)["forward"] == Tuned(
        Choice("strided"), {"dense": 4e6, "strided": 1e6, "gathered": 2e6, "batched": 3e6}
    )
    assert ran(monkeypatch, 100, weight) == ["strided"]
    assert ran(monkeypatch, 128, weight) == ["strided"], "as many tokens to the next power of two"
    assert "strided" not in ran(monkeypatch, 129, weight)


@pytest.mark.usefixtures("slow")
def test_choices_are_remembered_by_later_processes(tmp_path: Path) -> None:
    tune(matrix(), 100)
    with ProcessPoolExecutor(1, SPAWN) as other:
        assert other.submit(_choice_in_another_process, str(tmp_path)).result() == "strided"


def _choice_in_another_process(folder: str) -> str:
    import os

    os.environ["LPVIT_CACHE"] = folder
    tuned.forget()
    return dispatch.choose("forward", "auto", torch.empty(100, 96), matrix()).backend


def _record(folder: str, number: int) -> None:
    import os

    os.environ["LPVIT_CACHE"] = folder
    tuned.forget()
    for step in range(5):
        tuned.record({f"{number} {step}": Tuned(Choice("dense"), {"dense": 1.0})})


def test_concurrent_writers_lose_nothing(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, SPAWN) as pool:
        list(pool.map(_record, [str(tmp_path)] * 3, range(3)))
    tuned.forget()
    assert all(tuned.find(f"{number} {step}") for number in range(3) for step in range(5))
    assert not list(tmp_path.glob(".tuned*")), "nothing half-written is left"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "entries": {"a": {"choice": 7}}}'])
@pytest.mark.usefixtures("slow")
def test_a_corrupt_file_is_written_anew(text: str) -> None:
    tuned.path().parent.mkdir(parents=True, exist_ok=True)
    tuned.path().write_text(text)
    with pytest.warns(UserWarning, match="nothing counts as tuned"):
        assert dispatch.choose("forward", "auto", torch.empty(100, 96), matrix()).backend == "gathered"
    with pytest.warns(UserWarning, match="nothing counts as tuned"):
        tune(matrix(), 100)
    assert dispatch.choose("forward", "auto", torch.empty(100, 96), matrix()).backend == "strided"
    assert json.loads(tuned.path().read_text())["format"] == tuned.FORMAT


def test_a_file_of_another_format_counts_as_empty() -> None:
    tuned.path().write_text('{"format": 0, "entries": "other"}')
    assert tuned.find("anything") is None


def test_every_form_is_timed_and_the_fastest_wins() -> None:
    weight = matrix(0.1)
    found = tune(weight, 64)
    assert set(found["forward"].times_us) == set(found["input_gradient"].times_us) == {"dense", *cpu.FORMS}
    assert set(found["weight_gradient"].times_us) == set(cpu.GRADIENTS), "there is no dense gradient"
    for entry in found.values():
        assert entry.times_us[entry.choice.backend] == min(entry.times_us.values()) > 0
    assert set(tune(weight, 1000)["forward"].times_us) == {"dense", "strided", "gathered"}, "batched is for few tokens"


def test_other_threads_types_densities_and_machines_are_other_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.empty(100, 96), matrix()
    key = dispatch.case("forward", x, weight).key
    assert dispatch.case("forward", x, matrix()).key == key
    assert dispatch.case("forward", x.double(), weight).key != key
    assert dispatch.case("input_gradient", x, weight).key != key
    assert dispatch.case("forward", x, matrix(0.9)).key != key
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert dispatch.case("forward", x, weight).key != key
    monkeypatch.undo()
    assert torch.__version__ in key


@pytest.mark.usefixtures("slow")
def test_a_cache_that_cannot_be_written_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPVIT_CACHE", "/proc/nowhere")
    with pytest.warns(UserWarning, match="cannot be written"):
        tune(matrix(), 100)
    assert dispatch.choose("forward", "auto", torch.empty(100, 96), matrix()).backend == "strided"


def test_masks_whose_rows_agree_are_smaller_dense_products() -> None:
    weight, mask = masked((64, 96), (16, 16), 0.5)
    mask[:] = torch.tensor([True, False, False, True, False, True])
    mask[2] = False
    agreeing = BlockSparseMatrix.from_dense(weight, (16, 16), mask)
    assert dispatch.choose("forward", "auto", torch.empty(200, 96), agreeing).backend == "dense"
    assert dispatch.choose("input_gradient", "auto", torch.empty(200, 64), agreeing).backend == "dense"
    assert dense._shrunk(agreeing)[0].shape == (48, 48)
    random = BlockSparseMatrix.from_dense(weight, (16, 16), mask.flatten().roll(1).reshape(mask.shape))
    keys = {dispatch.case("forward", torch.empty(200, 96), one).key for one in (agreeing, random)}
    assert len(keys) == 2, "what is tuned for one says nothing of the other"
    x = torch.randn(5, 96)
    assert relative(linear(x, agreeing), linear(x, agreeing, backend="reference").double()) < 1e-6
    mask[0, 0] = False
    other = BlockSparseMatrix.from_dense(weight, (16, 16), mask)
    assert dispatch.choose("forward", "auto", torch.empty(200, 96), other).backend == "gathered"
