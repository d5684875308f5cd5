"""A model's forward pass over many images, a block at a time: what each layer is given, while the layers before it change.

A block is a module that a pass calls once: a transformer block. What it was given is remembered for every batch, so that its
layers can be asked again and again; of the blocks before it nothing is kept but what the last one gave. Memory is bounded by
one block, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli.devices import autocast
from lpvit_cli.tokens.merge import TokenMerge

OUTSIDE = "/"  # no module has such a name


class _Reached(Exception):
    """Unwinds a forward pass that has come to where it was to go."""


@dataclass(frozen=True)
class Block:
    """A module that is called once in a pass, and its layers of interest, in the order in which they run; a merge of tokens
    has none."""

    name: str  # "": the whole model
    layers: tuple[str, ...]


def blocks_of(model: nn.Module, layers: Collection[str], example: Tensor) -> list[Block]:
    """The blocks that hold `layers`, in the order in which they run; `example`: an input of one image or more.

    A layer's block is the innermost numbered module around it (`blocks.3`), where there is none the layer itself. Where such
    modules do not run one after the other, each once and with tensors for results, or where one is given more than what the
    one before it has given, the whole model is one block.
    """
    names = {layer: _numbered(layer) for layer in layers}
    names = {layer: min((b for b in names.values() if _inside(name, b)), key=len) for layer, name in names.items()}
    names |= {name: name for name, module in model.named_modules() if isinstance(module, TokenMerge)}
    called: dict[str, list[Any]] = {name: [] for name in (*names.values(), *layers)}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, result: called[name].append(result)

    order: list[str] = []
    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in called]
    handles += [model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: order.append(n)) for n in called]
    handles += [model.get_submodule(n).register_forward_hook(lambda m, a, r: order.append(OUTSIDE)) for n in {*names.values()}]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    ran = list(dict.fromkeys(layer for layer in order if layer in layers))
    once = all(len(called[name]) == 1 and _is_tensors(called[name][0]) for name in names.values())
    apart = all(_inside(layer, names[layer]) for layer in ran) and _one_after_the_other(order, names)
    if not (once and apart):
        return [Block("", tuple(ran))]
    names_in_order = dict.fromkeys(name for name in order if name in names.values())
    blocks = [Block(name, tuple(layer for layer in ran if names[layer] == name)) for name in names_in_order]
    return blocks if _is_a_row(model, blocks, example) else [Block("", tuple(ran))]


def _numbered(layer: str) -> str:
    parts = layer.split(".")
    ends = [end for end in range(len(parts) - 1, 0, -1) if parts[end - 1].isdigit()]
    return ".".join(parts[: ends[0]]) if ends else layer


def _inside(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


def _one_after_the_other(order: list[str], names: dict[str, str]) -> bool:
    """Whether no layer runs while another block than its own does, and no block inside of another."""
    current = OUTSIDE
    for name in order:
        if name == OUTSIDE:
            current = OUTSIDE
        elif name in names.values():
            if current != OUTSIDE:
                return False
            current = name
        if name in names and names[name] != current:
            return False
    return True


def _is_a_row(model: nn.Module, blocks: list[Block], example: Tensor) -> bool:
    """Whether no blank of a block that is done reaches a later one."""
    replay, blank = Replay(model, [example], example.device, torch.float32), False

    def look(tensor: Tensor) -> Tensor:
        nonlocal blank
        blank |= bool(tensor.isnan().any())
        return tensor

    for block in blocks:
        replay.enter(block.name)
        _mapped(replay.given, look)
    return not blank


def _is_tensors(result: Any) -> bool:
    """Or a tuple of them, with None where an architecture can give more."""
    return isinstance(result, Tensor) or (isinstance(result, tuple) and all(p is None or isinstance(p, Tensor) for p in result))


class Replay:
    """The passes of one model over all `batches`, images [n, C, H, W] on any device.

    They compute in `dtype`, on the model's `device`; what blocks are given and give is remembered in `dtype` too.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self.batches = batches
        self.name = ""
        self.given: list[Any] = [((images,), {}) for images in batches]  # arguments of the block, for each batch
        self.gave: dict[str, list[Any]] = {}  # results of the blocks before it; blanks, but for the last one

    def enter(self, name: str) -> None:
        """Go on to block `name`, past the one before it as that is now."""
        if name == "":
            return
        if self.name:
            self.gave[self.name] = [self._remembered(self._run(given)) for given in self.given]
        block, self.given = self.model.get_submodule(name), []
        for number, images in enumerate(self.batches):
            results = {done: self._recalled(gave[number]) for done, gave in self.gave.items()}
            with _standing_in(self.model, results), _reaching(block) as reached:
                self._forward(self.model, (images.to(self.device, torch.float32),), {})
            self.given.append(self._remembered(reached[0]))
        if self.name:
            self.gave[self.name] = [_mapped(result, self._blank) for result in self.gave[self.name]]
        self.name = name

    def follow(self, other: Replay) -> None:
        """Where the block is a merge of tokens: merge those which are merged in the `other` model, so that the tokens of both
        stay comparable."""
        if isinstance(self.model.get_submodule(self.name), TokenMerge):
            pairs = zip(self.given, other.given, strict=True)
            self.given = [(args, {**kwargs, "like": theirs[0]}) for (args, kwargs), (theirs, _) in pairs]

    def taken_on(self, model: nn.Module) -> Replay:
        """The passes of a copy of the model that is the same up to where these are."""
        other = Replay(model, self.batches, self.device, self.dtype)
        other.name, other.given, other.gave = self.name, self.given, dict(self.gave)
        return other

    def inputs(self, layer: str) -> Iterator[Tensor]:
        """What `layer`, one of the block's, is given [tokens, in] when it is called first, batch by batch."""
        for given in self.given:
            with _reaching(self.model.get_submodule(layer)) as reached:
                self._run(given)
            args, _ = reached[0]
            yield args[0].flatten(0, -2)

    def _run(self, given: Any) -> Any:
        args, kwargs = self._recalled(given)
        return self._forward(self.model.get_submodule(self.name), args, kwargs)

    def _forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        with torch.no_grad(), autocast(self.device, self.dtype), suppress(_Reached):
            return module(*args, **kwargs)

    def _remembered(self, values: Any) -> Any:
        return _mapped(values, lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor)

    def _recalled(self, values: Any) -> Any:
        return _mapped(values, lambda tensor: (tensor.float() if tensor.is_floating_point() else tensor).to(self.device))

    def _blank(self, tensor: Tensor) -> Tensor:
        """Of the same shape, but without memory: what a block that is done gives where nothing depends on it any more. What
        would depend on it after all becomes NaN. What is no features, of how many patches a token stands for, stays."""
        if not tensor.is_floating_point() or tensor.shape[-1] == 1:
            return tensor
        return torch.full((), torch.nan, device=self.device, dtype=tensor.dtype).expand(tensor.shape)


def _give(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands where the forward of a block was, and gives what it gave."""
    return result


@contextmanager
def _standing_in(model: nn.Module, results: Mapping[str, Any]) -> Iterator[None]:
    """Blocks that do not run inside, but give these results; they stay where they are, for models that look at them."""
    blocks = [(model.get_submodule(name), result) for name, result in results.items()]
    own = [block.__dict__.get("forward") for block, _ in blocks]  # some libraries put one there
    try:
        for block, result in blocks:
            block.__dict__["forward"] = partial(_give, result)
        yield
    finally:
        for (block, _), forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


@contextmanager
def _reaching(module: nn.Module) -> Iterator[list[Any]]:
    """A forward pass inside ends before `module`; its arguments are in the list."""
    reached: list[Any] = []

    def reach(_: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(reach, with_kwargs=True)
    try:
        yield reached
    finally:
        handle.remove()


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`values` with every tensor in it changed, in tuples, lists and dicts too."""
    if isinstance(values, Tensor):
        return change(values)
    if type(values) in (tuple, list):
        return type(values)(_mapped(value, change) for value in values)
    if isinstance(values, dict):
        return {key: _mapped(value, change) for key, value in values.items()}
    return values
