"""Choosing a backend: by rule, by what was tuned, and the file that remembers."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import FRESH, masked, relative
from lpvit_kernels import BlockSparseMatrix, backends, cpu, dense, dispatch, linear, tune, tuned, tuning
from lpvit_kernels.memo import _MEMO
from lpvit_kernels.tuned import Choice, Config, Tuned
from torch._subclasses import FakeTensorMode

BLOCK = (32, 16)


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


@pytest.fixture
def gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU by name, on a machine where triton cannot be imported."""
    found = importlib.util.find_spec
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None if name == "triton" else found(name))
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("lpvit_kernels.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    caches = dispatch.hardware, dispatch.triton_missing, dispatch._choice
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("gpu_without_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_without_triton_runs_dense(device: str, dtype: torch.dtype) -> None:
    """Only where a kernel would run is triton asked for; the case has a name, so that it can be tuned."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, values = torch.empty(100, 96, dtype=dtype, device=device), torch.empty(1, *BLOCK, dtype=dtype, device=device)
    weight = matrix().to(dtype)
    expected = {"forward": "dense", "input_gradient": "dense", "weight_gradient": "gathered"}
    on_gpu = SimpleNamespace(values=values, block=BLOCK)
    for kind in dispatch.KINDS:
        assert dispatch.choose(kind, "auto", x, weight).backend == expected[kind]
        assert tuning.candidates(kind, on_gpu, 100) == [Choice(expected[kind])]  # type: ignore[arg-type]
        key = dispatch.case(kind, x, weight).key
        assert key.startswith(f"A GPU, torch {torch.__version__}, no triton | {kind}")
        tuned.record({key: Tuned(Choice("triton"), {"triton": 1.0})})
        assert dispatch.choose(kind, "auto", x, weight).backend == expected[kind], "tuned while there was one"
    assert not dispatch.runs_triton("auto", x)
    assert backends.refusal("triton", device) == "the triton backend cannot run: triton is not installed"
    assert backends.refusal("dense", device) is None


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
    with ProcessPoolExecutor(1, FRESH) as other:
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
    with ProcessPoolExecutor(3, FRESH) as pool:
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


def entry(backend: str, config: object = None) -> dict[str, object]:
    return {"choice": {"backend": backend, "config": config}, "times_us": {backend: 1.0}}


CONFIG = {"tile": 64, "step": 64, "warps": 4, "stages": 3, "descriptors": False, "splits": 1, "registers": None}


@pytest.mark.parametrize(
    "bad",
    [
        entry("cusparse"),
        entry("triton"),
        entry("triton", {"tile": 64}),
        entry("triton", {**CONFIG, "tile": "64"}),
        entry("triton", {**CONFIG, "warps": -1}),
        entry("triton", {**CONFIG, "speed": 1}),
        entry("triton", 7),
    ],
    ids=str,
)
def test_entries_that_cannot_be_used_are_left_out(bad: dict[str, object]) -> None:
    """By this version, or on this device; the others serve."""
    weight, x = matrix(), torch.randn(100, 96)
    keys = {kind: dispatch.case(kind, x, weight).key for kind in dispatch.KINDS}
    entries = {keys["forward"]: bad, keys["input_gradient"]: entry("dense"), keys["weight_gradient"]: entry("dense")}
    tuned.path().write_text(json.dumps({"format": tuned.FORMAT, "entries": entries}))
    assert dispatch.choose("forward", "auto", x, weight).backend == "gathered"
    assert dispatch.choose("input_gradient", "auto", torch.empty(100, 64), weight).backend == "dense"
    assert dispatch.choose("weight_gradient", "auto", x, weight).backend == "gathered"
    linear(x, weight.with_values(weight.values.requires_grad_())).sum().backward()


def test_configurations_come_back_from_the_file() -> None:
    choice = Tuned(Choice("triton", Config(64, 32, 4, 3, True)), {"triton": 1.5, "dense": 2.0})
    tuned.record({"a": choice})
    tuned.forget()
    assert tuned.find("a") == choice


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").mkdir()
    with pytest.warns(UserWarning, match="cannot be written"):
        tuned.record({"a": Tuned(Choice("dense"), {"dense": 1.0})})
    assert tuned.find("a")
    assert not list(tmp_path.glob(".tuned*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strided_products_are_not_chosen_in_16_bits(dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    for kind in ("forward", "input_gradient"):
        assert Choice("strided") not in tuning.candidates(kind, weight, 100)
        assert Choice("strided") in tuning.candidates(kind, matrix(), 100)
    key = dispatch.case("forward", torch.empty(100, 96, dtype=dtype), weight).key
    tuned.record({key: Tuned(Choice("strided"), {"strided": 1.0})})
    assert dispatch.choose("forward", "auto", torch.empty(100, 96, dtype=dtype), weight).backend == "gathered"


def test_tuning_leaves_no_copies_and_no_random_numbers_behind() -> None:
    weight = matrix()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(weight, 40)
    assert weight.values not in _MEMO
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    ("arguments", "rule"), [((4, "forward"), "kinds must be some of"), ((0,), "tokens must be at least 1")]
)
def test_tuning_what_is_not(arguments: tuple[object, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        tune(matrix(), *arguments)  # type: ignore[arg-type]
