"""The state of a recovery in one file, written whole or not at all: a kill leaves the previous one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import parse_json, reason
from lpvit_cli.models.tensors import write_tensors

Groups = dict[str, dict[str, Tensor]]  # "model", "optimizer" and so on: tensors by name


def write(path: Path, groups: Groups, state: dict[str, Any]) -> None:
    """`state` holds what JSON can."""
    named = {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, {name: t.detach().cpu().contiguous() for name, t in named.items()}, {"state": json.dumps(state)})


def read(path: Path) -> tuple[Groups, dict[str, Any]]:
    """Raises EnvironmentFault when the file is damaged."""
    groups: Groups = {}
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Any] = parse_json(file.metadata()["state"])
            if not isinstance(state, dict):
                raise ValueError("its state has no names")
            for key in file.keys():  # noqa: SIM118 (no mapping)
                group, name = key.split(".", 1)
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise EnvironmentFault(f"{path}: unreadable checkpoint: {reason(error)}", "start anew with --no-resume") from error
    return groups, state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer whose values are all tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
