"""Whether a config.json and the weights beside it are of one model: told from shapes, before either takes memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import create
from lpvit_cli.models.families.wrapper import give_once, require_shape
from lpvit_cli.models.narrow import narrow_to
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import require_fit

SPARE = 200  # parameters of a head that is built and then taken away
PACKED = ("values", "row_ptr", "cols")


def require_one_model(config: Mapping[str, Any], header: Mapping[str, Tensor], path: Path) -> bool:
    """Build the model on the meta device, no larger than the file `path` says, and compare; header as of `read_header`.

    Returns whether an image went through: not all models bear it without memory. Raises EnvironmentFault, UsageError or what
    the architecture raises for arguments that it does not take.
    """
    with torch.device("meta"), _parameters_up_to(len(header) + SPARE, path):
        model = create(config)
        narrow_to(model, config.get("widths", {}))
        packed = [f"{name}.{part}" for name in config["sparsity"] for part in PACKED]
        if missing := [name for name in packed if name not in header]:
            raise ValueError(f"model.safetensors misses {missing[0]}")
        expected = model.state_dict()
        for name, layer in config["sparsity"].items():
            require_layer(name, layer, header[f"{name}.values"], model.get_submodule(name))
            del expected[f"{name}.weight"]
        orders = [f"{name}.order".lstrip(".") for name in config.get("ordered", [])]
        require_fit({name: tensor for name, tensor in header.items() if name not in {*packed, *orders}}, expected, path)
        try:
            require_output(model, config)
        except UsageError:
            return False
        return True


def require_layer(name: str, layer: Mapping[str, Any], values: Tensor, dense: nn.Module) -> None:
    """Raise ValueError where a packed layer is not as config.json says, or does not take the place of `dense`."""
    if list(values.shape[1:]) != layer["block"]:
        raise ValueError(f"{name}: blocks of {list(values.shape[1:])}, config.json says {layer['block']}")
    if len(values) != layer.get("kept", len(values)):
        raise ValueError(f"{name}: {len(values)} blocks, config.json says {layer['kept']}")
    if not isinstance(dense, nn.Linear) or list(dense.weight.shape) != layer["shape"]:
        raise ValueError(f"{name}: config.json says {layer['shape']}, the architecture something else")


def require_output(model: VisionModel, config: Mapping[str, Any]) -> None:
    """Raise UsageError where images as config.json describes them do not go through, or the output is another."""
    size = model.pretrained_cfg.get("input_size")
    if size is None:
        return
    output = give_once(model, size)
    require_shape(output, model.gives)
    classes = config.get("num_classes")
    if model.gives == "logits" and classes not in (None, output.shape[-1]):
        raise UsageError(f"config.json says {classes} classes, the model tells {output.shape[-1]} apart")


@contextmanager
def _parameters_up_to(limit: int, path: Path) -> Iterator[None]:
    """Raise ValueError as soon as modules of this thread register more parameters."""
    count, thread = 0, get_ident()

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        if get_ident() != thread:
            return
        count += 1
        if count > limit:
            raise ValueError(f"it has more tensors than the {limit - SPARE} of {path.name}")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()
