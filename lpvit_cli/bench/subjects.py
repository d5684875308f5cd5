"""What bench compares, by name: models in eager PyTorch, compiled, as CUDA graphs, and ONNX files in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lpvit_kernels import forget
from torch import Tensor, nn

from lpvit_cli.devices import type_name
from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.export.opening import open_model
from lpvit_cli.measure.memory import peak_bytes
from lpvit_cli.measure.timing import Subject
from lpvit_cli.models.folder import load_model, read_config
from lpvit_cli.models.merging import merge_tokens
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.trim import trim
from lpvit_cli.recipe.measure import OF_MERGING
from lpvit_cli.sparse import densify, freeze, fuse, sparse_layers
from lpvit_cli.targets.base import ExportedModel
from lpvit_cli.targets.onnxruntime import OnnxModel
from lpvit_cli.tokens.blocks import merging_of, unmerged

BASELINE = "baseline"  # the subject that bench.baseline names
GRAPH, COMPILED = "-graph", "-compiled"
LABELS = {
    "dense": "dense PyTorch",
    "dense-compiled": "compiled dense PyTorch",
    "dense-graph": "dense PyTorch as a CUDA graph",
    "dense-compiled-graph": "compiled dense PyTorch as a CUDA graph",
    "dense-onnx": "dense onnxruntime",
    "dense-onnx-int8": "dense onnxruntime in int8",
}
DENSE_FILES = ("dense-onnx", "dense-onnx-int8")
LEAVE_OUT = "leave it out of bench.subjects"
Opener = Callable[[], Subject]


@dataclass
class Prepared:
    """Subjects for images of one size. `notes`: why CUDA graphs that were not asked for are left out."""

    openers: dict[str, Opener] = field(default_factory=dict)
    memory_bytes: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Subjects:
    """The subjects of a bench, on one device in one dtype. Models stay; sessions of onnxruntime are opened when they are
    needed, one at a time, because idle threads of others spin. `scratch`: a folder for files that live as long as this.

    Raises UsageError or EnvironmentFault for what cannot run here, or does not fit together.
    """

    def __init__(
        self,
        names: Sequence[str],
        dense: VisionModel,
        pruned: Path,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
        opset: int,
        prunable: Callable[[str], bool],
        onnx_file: Path | None = None,
        baseline: Path | None = None,
    ):
        """`pruned`: a model folder; `prunable`: names of layers that int8 files have in int8; `onnx_file`: what `onnx` is;
        `baseline`: another run folder, model folder or ONNX file."""
        self.device, self.dtype = device, dtype
        self.asked = (*([BASELINE] if baseline else []), *names)
        self.labels = LABELS | {BASELINE: "/".join(baseline.parts[-2:]) if baseline else ""}
        self.files: dict[str, Path] = {"onnx": onnx_file} if onnx_file else {}
        if baseline and baseline.suffix == ".onnx":
            self.files[BASELINE] = baseline
        for name in self.asked:
            self._require_possible(name)
        sparse = load_model(pruned).to(device, dtype)
        self.models = {"dense": dense, "sparse": fuse(trim(sparse))}
        if any(name.startswith("masked-dense") for name in self.asked):
            self.models["masked-dense"] = densify(sparse)
        if {*OF_MERGING} & {*self.asked} and (merging := merging_of(sparse)):
            self.models["merged-dense"] = merge_tokens(dense, merging)
            self.models["unmerged-sparse"] = fuse(trim(unmerged(sparse)))
        self.input_size = tuple(dense.pretrained_cfg["input_size"])
        if asked := [name for name in DENSE_FILES if name in self.asked]:
            self.files |= _write_dense(asked, dense, prunable, read_config(pruned), opset, scratch)
        if baseline:
            self._open_baseline(baseline)
        for model in self.models.values():
            model.to(device, dtype)

    @property
    def sessions(self) -> bool:
        """Whether some must not be alive together."""
        return bool(self.files)

    def prepare(self, images: Tensor) -> Prepared:
        """All subjects for images [n, 3, H, W]. On a GPU the eager models run as CUDA graphs too: there the host cannot be what
        is measured."""
        if any(COMPILED in name for name in self.asked):
            torch.compiler.reset()  # what was compiled for other batches counts against a limit
        made = Prepared()
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None  # replayed in turn, they share memory
        graphs = [f"{name}{GRAPH}" for name in self.asked if name in ("dense", "sparse")] if pool else []
        # graphs last: they hold addresses of what backends keep of weights, and measuring memory drops that
        asked = [name for name in self.asked if name not in OF_MERGING or name in self.models]
        made.notes += [f"left out: {name}: this model merges no tokens" for name in self.asked if name not in asked]
        for name in sorted(dict.fromkeys((*asked, *graphs)), key=lambda name: name.endswith(GRAPH)):
            try:
                model = self._called(name, images)
                made.openers[name] = self._opener(name, model, images, pool)
            except EnvironmentFault as error:
                if name in self.asked:
                    raise
                made.notes.append(f"left out: {error.message}")
            else:
                made.memory_bytes[name] = self._peak_memory_bytes(name, model, made.openers[name])
        return made

    def _peak_memory_bytes(self, name: str, model: nn.Module | None, opener: Opener) -> int | None:
        """Weights as stored, and the most that a call holds beyond them: activations, and what backends keep of weights.

        None: not known, as for CUDA graphs, whose memory is their common pool's.
        """
        if name.endswith(GRAPH):
            return None
        if model is None:
            return peak_bytes(lambda: opener()(), self.device)
        subject = opener()
        subject()  # libraries take their workspaces: those are nobody's
        for layer in sparse_layers(model).values():
            forget(layer.weight)
        extra = peak_bytes(subject, self.device)
        return None if extra is None else extra + sum(tensor.nbytes for tensor in model.state_dict().values())

    def _called(self, name: str, images: Tensor) -> nn.Module | None:
        """The model that a subject calls, frozen where it is neither compiled nor a graph: there Python's own time counts.

        None: it is a session.
        """
        if name in self.files:
            return None
        model = self.models[name.removesuffix(GRAPH).removesuffix(COMPILED)]
        return freeze(model, images) if name in self.models else model

    def _opener(self, name: str, model: nn.Module | None, images: Tensor, pool: Any) -> Opener:
        if model is None:
            return partial(_open_session, self.files[name], images)
        captured = name.endswith(GRAPH)
        compiled = name.removesuffix(GRAPH).endswith(COMPILED)
        subject = forward_of(torch.compile(model, dynamic=False) if compiled else model, images)
        if compiled:
            _attempt(subject, f"{name}: torch.compile fails here")
        if captured:
            replay: list[Subject] = []
            _attempt(lambda: replay.append(_capture(subject, pool)), f"{name}: cannot be captured in a CUDA graph")
            subject = replay[0]
        return lambda: subject

    def _require_possible(self, name: str) -> None:
        if name.endswith(GRAPH) and self.device.type != "cuda":
            raise EnvironmentFault(
                f"{name}: CUDA graphs need a GPU, this device is {self.device}", f"{LEAVE_OUT}, or --device cuda"
            )
        if (name in self.files or "onnx" in name) and (self.device.type, self.dtype) != ("cpu", torch.float32):
            raise UsageError(
                f"{self.labels.get(name, name)}: onnxruntime runs in float32 on the CPU here, this bench in "
                f"{type_name(self.dtype)} on {self.device}",
                f"{LEAVE_OUT}, or --device cpu --dtype float32",
            )

    def _open_baseline(self, path: Path) -> None:
        model, _ = open_model(str(path))
        if (given := tuple(model.pretrained_cfg["input_size"])) != self.input_size:
            raise UsageError(
                f"bench.baseline: {path} takes images of {list(given)}, the model of the recipe {list(self.input_size)}",
                "compare models that take the same images",
            )
        if BASELINE not in self.files:
            if isinstance(model, ExportedModel):
                raise UsageError(
                    f"bench.baseline: {path} is not a model of lpvit's", "give a run or model folder, or an ONNX file"
                )
            self.models[BASELINE] = fuse(trim(model.to(self.device, self.dtype)))


class Shelf:
    """Subjects of which at most one is open: another one is opened after letting that go."""

    def __init__(self, openers: dict[str, Opener]):
        self.openers = openers
        self._open: dict[str, Subject] = {}

    def get(self, name: str) -> Subject:
        if name not in self._open:
            self._open.clear()
            self._open[name] = self.openers[name]()
        return self._open[name]

    def subjects(self) -> dict[str, Subject]:
        return {name: partial(self._call, name) for name in self.openers}

    def _call(self, name: str) -> object:
        return self.get(name)()


def forward_of(model: Callable[[Tensor], object], images: Tensor) -> Subject:
    """The call that is timed."""

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


def _open_session(path: Path, images: Tensor) -> Subject:
    return forward_of(OnnxModel(path, torch.get_num_threads()), images)


def _write_dense(
    asked: list[str],
    model: VisionModel,
    prunable: Callable[[str], bool],
    config: dict[str, Any],
    opset: int,
    folder: Path,
) -> dict[str, Path]:
    """The files of those of DENSE_FILES that are asked for."""
    from lpvit_cli.export.onnx_file import DENSE_INT8, FILE, write_dense

    write_dense(model, prunable, opset, folder, config, int8="dense-onnx-int8" in asked)
    files = dict(zip(DENSE_FILES, (folder / FILE, folder / DENSE_INT8), strict=True))
    return {name: files[name] for name in asked}


def _attempt(step: Callable[[], object], what: str) -> None:
    """Compilers and captures fail in many ways, each of which means: not here. Too little memory is another matter."""
    try:
        step()
    except (torch.OutOfMemoryError, LpvitError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFault(f"{what}: {reason}", LEAVE_OUT) from error


def _capture(subject: Subject, pool: Any) -> Subject:
    """The subject as a CUDA graph; the models and images that it reads live as long as the graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # libraries and kernels set themselves up
            subject()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        subject()

    def replay(_alive: Subject = subject) -> None:
        graph.replay()

    return replay
