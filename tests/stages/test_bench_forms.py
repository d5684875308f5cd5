"""Subjects of bench that are compiled, captured as graphs or run in onnxruntime: one at a time, and faults by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lpvit_cli.bench import subjects
from lpvit_cli.bench.subjects import Shelf, Subjects
from lpvit_cli.errors import EnvironmentFault


def test_at_most_one_session_is_open() -> None:
    alive: set[str] = set()

    class Session:
        def __init__(self, name: str):
            assert not alive
            self.name = name
            alive.add(name)

        def __call__(self) -> str:
            return self.name

        def __del__(self) -> None:
            alive.discard(self.name)

    shelf = Shelf({"a": lambda: Session("a"), "b": lambda: Session("b")})
    calls = shelf.subjects()
    assert [calls[name]() for name in "aabba"] == list("aabba")
    assert shelf.get("a") is shelf.get("a")


def subjects_on(device: str, *asked: str) -> Subjects:
    made = object.__new__(Subjects)
    made.device, made.dtype, made.asked, made.files = torch.device(device), torch.float32, asked, {}
    made.models = {name: torch.nn.Linear(4, 4) for name in ("dense", "masked-dense", "sparse")}  # type: ignore[misc]
    return made


IMAGES = torch.zeros(2, 4)


def test_a_compiler_that_fails_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: object, dynamic: bool) -> Callable[..., None]:
        def call(images: object) -> None:
            raise RuntimeError("no C++ compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    made = subjects_on("cpu", "dense", "sparse-compiled")
    with pytest.raises(EnvironmentFault, match="sparse-compiled: torch.compile fails here: no C\\+\\+ compiler found$"):
        made.prepare(IMAGES)


def test_too_little_memory_while_compiling_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object, dynamic: bool) -> Callable[..., None]:
        def call(images: object) -> None:
            raise torch.OutOfMemoryError

        return call

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        subjects_on("cpu", "dense-compiled").prepare(IMAGES)


@pytest.fixture
def pretended_graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """CUDA graphs whose capture counts calls, and whose replay is a call."""
    state = SimpleNamespace(captured=[], fails=False, measured=[])

    def capture(subject: Callable[[], object], pool: str) -> Callable[[], object]:
        if state.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        state.captured.append(pool)
        return subject

    monkeypatch.setattr(subjects, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    monkeypatch.setattr(subjects, "peak_bytes", lambda call, device: state.measured.append(len(state.captured)) or 7)
    return state


def test_on_a_gpu_eager_models_run_as_graphs_too(pretended_graphs: SimpleNamespace) -> None:
    made = subjects_on("cuda", "dense", "sparse-compiled-graph", "masked-dense", "sparse").prepare(IMAGES)
    assert list(made.openers) == ["dense", "masked-dense", "sparse", "sparse-compiled-graph", "dense-graph", "sparse-graph"]
    assert pretended_graphs.captured == ["pool"] * 3, "of one pool"
    assert made.notes == []
    weights = 4 * (4 * 4 + 4)
    assert list(made.memory_bytes.values()) == [weights + 7] * 3 + [None] * 3
    assert pretended_graphs.measured == [0, 0, 0], "before any capture: it drops what graphs would hold addresses of"


def test_a_capture_that_fails_is_a_note_unless_it_was_asked_for(pretended_graphs: SimpleNamespace) -> None:
    pretended_graphs.fails = True
    made = subjects_on("cuda", "dense", "sparse").prepare(IMAGES)
    assert list(made.openers) == list(made.memory_bytes) == ["dense", "sparse"]
    assert made.notes[0].startswith("left out: dense-graph: cannot be captured in a CUDA graph: operation not permitted")
    with pytest.raises(EnvironmentFault, match="sparse-graph: cannot be captured"):
        subjects_on("cuda", "dense", "sparse-graph").prepare(IMAGES)


def test_a_graph_is_captured_after_warming_up_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended CUDA: what is launched goes to the current stream, or into the graph that captures."""
    log: list[str] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            log.append("wait")

    class Within:
        def __init__(self, what: str):
            self.what = what

        def __enter__(self) -> None:
            log.append(self.what)

        def __exit__(self, *_: object) -> None:
            log.append(f"end {self.what}")

    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Within("aside"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured, pool: Within(f"graph in {pool}"))
    replay = subjects._capture(lambda: log.append("call"), "pool")
    assert log == ["wait", "aside", *["call"] * 3, "end aside", "wait", "graph in pool", "call", "end graph in pool"]
    replay()
    assert log[-1] == "replay"
