"""How long each linear layer takes within a model, and what it moves: hooks around the layers, in passes of the whole model.

On a GPU the hooks record events, so that nothing is waited for within a pass; where the host cannot keep up, a layer's time
holds its launch too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PASS = ""  # what the whole pass is called among the layers: the name that torch gives the model itself
Mark = Any  # a moment: a torch.cuda.Event, or seconds


@dataclass(frozen=True)
class Traffic:
    """What a call of a layer works on."""

    rows: int  # of x
    moved_bytes: int  # x, the weight as stored, bias, residual and result, each once


class LayerWatch:
    """Times of `layers`, parts of `model` by name, and of the whole pass (`PASS`), for every `take()`."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor):
        self.model, self.layers, self.images, self.gpu = model, layers, images, images.device.type == "cuda"
        self.traffic: dict[str, Traffic] = {}
        self.samples_ms: dict[str, list[float]] = {name: [] for name in (PASS, *self.layers)}
        self._marks: dict[str, list[Mark]] = {}

    def take(self) -> None:
        """One pass of the model."""
        watched = {PASS: self.model, **self.layers}
        self._marks = {name: [] for name in watched}
        handles = [part.register_forward_pre_hook(self._before(name)) for name, part in watched.items()]
        handles += [part.register_forward_hook(self._after(name), with_kwargs=True) for name, part in watched.items()]
        try:
            with torch.inference_mode():
                self.model(self.images)
        finally:
            for handle in handles:
                handle.remove()
        if self.gpu:
            torch.cuda.synchronize(self.images.device)
        for name, marks in self._marks.items():
            spans = zip(marks[::2], marks[1::2], strict=True)
            self.samples_ms[name].append(sum(self._span_ms(begin, end) for begin, end in spans))

    def _mark(self) -> Mark:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _span_ms(self, begin: Mark, end: Mark) -> float:
        return float(begin.elapsed_time(end)) if self.gpu else 1e3 * (end - begin)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._marks[name].append(self._mark())

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], result: Tensor) -> None:
            self._marks[name].append(self._mark())
            if name != PASS and name not in self.traffic:
                moved = _bytes_of((*inputs, *named.values(), result)) + _stored_bytes(module)
                self.traffic[name] = Traffic(inputs[0].flatten(0, -2).shape[0], moved)

        return hook


def watch_in_turn(watches: list[LayerWatch], rounds: int, on_round: Callable[[int, int], None]) -> None:
    """Passes of all models in turn, there and back; the first two of each, which warm up, are forgotten."""
    for number in range(-2, rounds):
        for watch in watches if number % 2 == 0 else reversed(watches):
            watch.take()
        if number == -1:
            for watch in watches:
                watch.samples_ms = {name: [] for name in watch.samples_ms}
        if number >= 0:
            on_round(number + 1, rounds)


def moved_bytes(model: nn.Module, images: Tensor) -> int:
    """What one call moves at least: all weights as stored, once, and what every innermost module takes and gives.

    What attention moves between its modules is not in it.
    """
    moved = _stored_bytes(model)

    def count(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        nonlocal moved
        if not any(result is given for given in inputs):  # nothing is done by Identity, nor by Dropout now
            moved += _bytes_of((*inputs, *named.values(), result))

    innermost = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(count, with_kwargs=True) for module in innermost]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return moved


def _stored_bytes(module: nn.Module) -> int:
    return _bytes_of((*module.parameters(), *module.buffers()))


def _bytes_of(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))
