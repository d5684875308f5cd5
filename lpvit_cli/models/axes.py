"""Features of a model that several tensors hold, and that may change places in all of them at once.

Hidden neurons of MLPs, dimensions of the values and of the queries and keys within each attention head, and the channels of
the residual stream. They are guessed from how modules are built: `order` proves that a guess holds before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpvit_cli.models.coupled import COUNTS
from lpvit_cli.models.ordered import ordered_modules

Kind = Literal["neurons", "values", "queries", "residual"]
MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),  # of twice the neurons where it makes their gates too
    (("fc1_g", "fc1_x"), "fc2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("weights_in",), "weights_out"),
    (("w12",), "w3"),
)
ATTENTIONS = (("qkv",), ("q_proj", "k_proj", "v_proj"))
CONSUMERS = ("proj", "o_proj", "out_proj")


@dataclass(frozen=True)
class Member:
    """Along `dim` of the parameter or buffer `tensor`, position `index[k, i]` holds feature i, of its copy k."""

    tensor: str
    dim: int
    index: Tensor  # [copies, features] int64


@dataclass(frozen=True)
class Axis:
    """Features that have the same places in all members. Cells of a group may change places, their features stay together."""

    kind: Kind
    name: str
    cells: Tensor  # [groups, cells, width]: features
    members: tuple[Member, ...]
    end: str | None = None  # of the residual stream that leaves the model: the module that gives it in the original order

    @property
    def size(self) -> int:
        """Its features."""
        return self.members[0].index.shape[1]


@dataclass(frozen=True)
class Part:
    """An MLP or attention: layers that read `stream` features of the residual stream, and the one that writes to it."""

    name: str
    readers: tuple[str, ...]
    writer: str
    stream: int
    axes: tuple[Axis, ...]


def axes(model: nn.Module, end: str | None = None) -> list[Axis]:
    """All axes of a dense `model`; the residual streams come last, the one that leaves the model at the very end.

    That one ends at the module `end`, "" being the model itself; without it where a module gives features in order already,
    or else at the norm after the last block, or at the output where there is none.
    """
    parts = [part for name, module in model.named_modules() if (part := _attention(name, module) or _mlp(name, module))]
    found = [axis for part in parts for axis in part.axes]
    return found + (_streams(model, parts, end) if parts else [])


def _mlp(name: str, module: Any) -> Part | None:
    for producers, consumer in MLPS:
        if not _linears(module, (*producers, consumer)) or not _is_nothing(getattr(module, "gate", None)):
            continue
        neurons = getattr(module, consumer).in_features
        copies = getattr(module, producers[0]).out_features // neurons
        if any(getattr(module, producer).out_features != copies * neurons for producer in producers):
            continue
        rows = _copies(neurons, copies)
        members = [member for producer in producers for member in _rows(module, name, producer, rows)]
        members += [Member(_path(name, f"{consumer}.weight"), 1, _copies(neurons)), *_norm(module, name, neurons)]
        axis = Axis("neurons", _path(name, "neurons"), torch.arange(neurons).view(1, -1, 1), tuple(members))
        return _part(module, name, producers, consumer, (axis,))
    return None


def _attention(name: str, module: Any) -> Part | None:
    """Of heads that all have queries, keys and values of their own, as wide as what the consumer reads of each."""
    producers = next((layers for layers in ATTENTIONS if _linears(module, layers)), None)
    consumer = next((layer for layer in CONSUMERS if _linears(module, (layer,))), None)
    heads = next((getattr(module, count) for count in COUNTS if isinstance(getattr(module, count, None), int)), None)
    if producers is None or consumer is None or heads is None:
        return None
    features = getattr(module, consumer).in_features
    readers = (*producers, "gate") if _linears(module, ("gate",)) else producers
    rows = 3 * features if len(producers) == 1 else features
    if features % heads or any(getattr(module, producer).out_features != rows for producer in producers):
        return _part(module, name, readers, consumer, ())
    own = _copies(features)
    q, k, v = (
        ((producers[0], own + place * features) for place in range(3)) if rows > features else ((p, own) for p in producers)
    )
    values = [*_rows(module, name, *v), Member(_path(name, f"{consumer}.weight"), 1, own), *_norm(module, name, features)]
    values += _rows(module, name, "gate", own) if len(readers) > len(producers) else []
    queries = [*_rows(module, name, *q), *_rows(module, name, *k)]
    for members, biases in ((values, ("v_bias",)), (queries, ("q_bias", "k_bias"))):
        members += [Member(_path(name, bias), 0, own) for bias in biases if isinstance(getattr(module, bias, None), Tensor)]
    cells = torch.arange(features).view(heads, -1, 1)
    found = (
        Axis("values", _path(name, "values"), cells, tuple(values)),
        Axis("queries", _path(name, "queries"), cells, tuple(queries)),
    )
    return _part(module, name, readers, consumer, found)


def _part(module: Any, name: str, readers: tuple[str, ...], consumer: str, found: tuple[Axis, ...]) -> Part:
    layers = tuple(_path(name, reader) for reader in readers)
    return Part(name, layers, _path(name, consumer), getattr(module, readers[0]).in_features, found)


def _streams(model: nn.Module, parts: list[Part], end: str | None) -> list[Axis]:
    """One residual stream for each run of blocks of the same width."""
    trunk, blocks = _blocks(parts)
    sizes = [size for size, _ in groupby(part.stream for part in blocks)]
    if end is None:
        end = next(iter(ordered_modules(model)), _end(model, trunk))
    members: list[list[Member]] = [[] for _ in sizes]
    for stage, member in _walk(model, parts, blocks, end):
        members[stage].append(member)
    last = len(sizes) - 1
    return [
        Axis("residual", f"residual.{n}", torch.arange(size).view(1, -1, 1), tuple(held), end if n == last else None)
        for n, (size, held) in enumerate(zip(sizes, members, strict=True))
    ]


def _walk(model: nn.Module, parts: list[Part], blocks: list[Part], end: str) -> Iterator[tuple[int, Member]]:
    """What holds channels of a stream, and of which: modules in the order in which they are registered, up to `end`."""
    sizes = [size for size, _ in groupby(part.stream for part in blocks)]
    stage_of = [n for n, (_, run) in enumerate(groupby(part.stream for part in blocks)) for _ in run]
    names, done = {part.name for part in parts}, 0
    for name, module in model.named_modules():
        if any(name == inside or name.startswith(f"{inside}.") for inside in names):
            if done < len(blocks) and name == blocks[done].name:
                yield from ((stage_of[done], member) for member in _of_part(model, blocks[done]))
                done += 1
            continue
        near = [(n, sizes[n]) for n in sorted({stage_of[max(done - 1, 0)], stage_of[min(done, len(blocks) - 1)]})]
        yield from _of_module(name, module, near, first=done == 0)
        if end and name == end:
            return


def _of_part(model: nn.Module, part: Part) -> Iterator[Member]:
    own = _copies(part.stream)
    yield from (Member(f"{reader}.weight", 1, own) for reader in part.readers)
    writer: Any = model.get_submodule(part.writer)
    if writer.out_features == part.stream:
        yield from _rows(writer, part.writer, "", own)


def _of_module(name: str, module: nn.Module, near: list[tuple[int, int]], first: bool) -> Iterator[tuple[int, Member]]:
    """Outside of attentions and MLPs. `near`: the streams, and their sizes, that may pass here, `first` before any block."""
    if isinstance(module, nn.Linear):
        (before, read), (after, written) = near[0], near[-1]
        if not first and before == after:
            return
        if before != after and module.in_features % read == 0:  # of the patches that it merges
            yield before, Member(_path(name, "weight"), 1, _copies(read, module.in_features // read))
        if module.out_features == written:
            yield from ((after, member) for member in _rows(module, name, "", _copies(written)))
        return
    for stage, size in near:
        own = _copies(size)
        if isinstance(module, nn.Conv2d):
            if module.out_channels == size:
                yield from ((stage, member) for member in _rows(module, name, "", own))
            if module.in_channels == size and module.groups == 1:
                yield stage, Member(_path(name, "weight"), 1, own)
            continue
        for tensor, value in _vectors(module):
            if value.shape[-1] == size:
                yield stage, Member(_path(name, tensor), value.ndim - 1, own)
    if len(near) > 1 and not isinstance(module, nn.Conv2d):
        stage, size = near[0]
        for tensor, value in _vectors(module):
            if value.shape[-1] == 4 * size and 4 * size != near[1][1]:  # the norm of merged patches
                yield stage, Member(_path(name, tensor), value.ndim - 1, _copies(size, 4))


def _vectors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the module itself, and buffers that hold one number for each feature."""
    yield from ((name, value) for name, value in module.named_parameters(recurse=False) if value.ndim)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.ndim == 1 and buffer.is_floating_point():
            yield name, buffer


def _blocks(parts: list[Part]) -> tuple[str, list[Part]]:
    """The name of the module that holds the blocks, and the parts in it: a list counts them, which poolings are not in."""
    shared = _common([part.name for part in parts])
    inside = [part for part in parts if any(piece.isdigit() for piece in part.name.removeprefix(shared).split("."))] or parts
    return _common([part.name for part in inside]), inside


def _common(names: list[str]) -> str:
    """The longest path, whole names of modules, at the beginning of all."""
    pieces = []
    for level in zip(*(name.split(".") for name in names), strict=False):
        if len(set(level)) > 1:
            break
        pieces.append(level[0])
    return ".".join(pieces)


def _end(model: nn.Module, trunk: str) -> str:
    """The first norm after the blocks, even if it is an identity now; where there is none the model itself."""
    names = [name for name, _ in model.named_modules()]
    inside = [n for n, name in enumerate(names) if name == trunk or name.startswith(f"{trunk}.")]
    after = names[inside[-1] + 1 :] if trunk and inside else []
    return next((name for name in after if "norm" in name.rpartition(".")[2]), "")


def _linears(module: Any, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)


def _norm(module: Any, name: str, features: int) -> list[Member]:
    """Of an inner norm, over all features that the consumer reads."""
    norm = getattr(module, "norm", None)
    held = _vectors(norm) if isinstance(norm, nn.Module) else ()
    return [Member(_path(name, f"norm.{tensor}"), 0, _copies(features)) for tensor, value in held if value.shape == (features,)]


def _rows(module: Any, name: str, layer: str, index: Tensor) -> list[Member]:
    """The rows, and their biases, of a layer of `module`, or of itself."""
    held = getattr(module, layer) if layer else module
    tensors = ("weight",) if held.bias is None else ("weight", "bias")
    return [Member(_path(name, layer, tensor), 0, index) for tensor in tensors]


def _copies(size: int, copies: int = 1) -> Tensor:
    return torch.arange(copies * size).view(copies, size)


def _path(*names: str) -> str:
    return ".".join(name for name in names if name)


def _is_nothing(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
