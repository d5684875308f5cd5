"""Which layers of a model may be pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.prune import Layers


def prunable_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Linear]:
    """nn.Linear modules whose name matches an include glob and no exclude glob."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: module for name, module in linears.items() if layers.match(name)}
    if not chosen:
        raise UsageError(
            f"prune.layers: no linear layer matches {list(layers.include)} without {list(layers.exclude)}",
            f"layers of this model: {', '.join(list(linears)[:4])} ...",
        )
    return chosen


def own_layers(model: nn.Module, example: Tensor, globs: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of any module that may be pruned: those it calls as modules, but for the one that gives its output.

    `globs` choose among them by name; none: the blocks of a timm model, else all. `example`: an input of one image or more.
    Raises UsageError where nothing is left.
    """
    called = _called_linears(model, example)
    wanted = Layers(include=tuple(globs)) if globs else Layers()
    chosen = {name: layer for name, layer in called.items() if wanted.match(name)}
    if not chosen and not globs:
        chosen = called
    if not chosen:
        raise UsageError(
            f"layers: {', '.join(globs) or 'none'} matches no linear layer that the model calls",
            f"it calls {', '.join(list(called)[:4]) or 'none'} ...",
        )
    return chosen


def _called_linears(model: nn.Module, example: Tensor) -> dict[str, nn.Linear]:
    """In the order of calls; attention of torch reads some weights without calling their layer: those are left out."""
    results: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs, result: results.update({name: result})

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            output = model(example)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model gives a {type(output).__name__}, not one tensor", "wrap it in a module that returns the tensor to keep"
        )
    final = output.untyped_storage().data_ptr()
    return {name: linears[name] for name, result in results.items() if result.untyped_storage().data_ptr() != final}
