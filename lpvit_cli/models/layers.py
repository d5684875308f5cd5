"""Which layers of a model may be pruned."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.prune import Layers, is_tiny


def prunable_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Linear]:
    """nn.Linear modules whose name matches an include glob and no exclude glob.

    Without include globs: those of the model's blocks, or where it has none by name, all that it calls but for the one that
    gives its output. Raises UsageError where nothing is left.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if layers.include is None and not any(layers.included(name) for name in linears):
        called = _called_linears(model, _black_image(model))
        inner = tuple(name for name, final in called.items() if not final and not is_tiny(name))
        if not inner:
            raise UsageError(
                "prune.layers: the blocks of this model have no linear layers that it calls: nothing can be pruned",
                "choose a transformer whose attention and MLPs are torch.nn.Linear",
            )
        layers = layers.model_copy(update={"include": inner})
    chosen = {name: module for name, module in linears.items() if layers.match(name)}
    if not chosen:
        raise UsageError(
            f"prune.layers: no linear layer matches {list(layers.included_globs)} without {list(layers.exclude)}",
            f"layers of this model: {', '.join(list(linears)[:4])} ...",
        )
    return chosen


def own_layers(model: nn.Module, example: Tensor, globs: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers of any module that may be pruned: those it calls as modules, but for the one that gives its output.

    `globs` choose among them by name; none: the blocks of a timm model, else all. `example`: an input of one image or more.
    Raises UsageError where nothing is left.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    called = {name: linears[name] for name, final in _called_linears(model, example).items() if not final}
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


def called_layers(model: nn.Module, example: Tensor) -> list[str]:
    """The names of the linear layers that the model calls as modules, in the order of calls. `example`: an input."""
    return list(_called_linears(model, example))


def require_called(chosen: Collection[str], called: Collection[str]) -> None:
    """Raise UsageError that names all layers whose weights are read by other code: replacing them would change nothing."""
    uncalled = [name for name in chosen if name not in called]
    if not uncalled:
        return
    globs = list(dict.fromkeys(_glob_of(name, set(called) & set(chosen)) for name in uncalled))
    shown = ", ".join(uncalled[:3]) + (f" and {len(uncalled) - 3} more" if len(uncalled) > 3 else "")
    raise UsageError(
        f"prune.layers: {len(uncalled)} of {len(chosen)} layers are not called as modules in this architecture, "
        f"so they cannot be made sparse: {shown}",
        f"leave them out: --set 'prune.layers.exclude=[{','.join(globs)}]'",
    )


def _glob_of(name: str, others: set[str]) -> str:
    """A glob for the same layer of every block; the name itself where that would match one of `others` too."""
    inside = re.split(r"(?<=\.)\d+\.", name)[-1]  # blocks.0.attn.qkv: attn.qkv
    glob = f"*.{inside}"
    return name if inside == name or any(fnmatch(other, glob) for other in others) else glob


def _black_image(model: nn.Module) -> Tensor:
    size: tuple[int, ...] = model.pretrained_cfg["input_size"]  # type: ignore[assignment, index]
    parameter = next(model.parameters())
    return torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)


def _called_linears(model: nn.Module, example: Tensor) -> dict[str, bool]:
    """Names in the order of calls, and whether the layer gives the model's output.

    Attention of torch, and some of timm, reads weights without calling their layer: those are left out.
    """
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
    final = output.untyped_storage()._cdata  # an address on the meta device too
    return {name: result.untyped_storage()._cdata == final for name, result in results.items()}
