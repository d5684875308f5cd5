"""safetensors files in and out. Pickles are refused, never loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import remove

ORDERS = "lpvit_orders"  # in the metadata of dense weights: what modules gather, by name
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Pickled checkpoints run code when loaded, so they are refused with the way to convert them."""
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file", "check the path; in a recipe it is relative to the recipe's folder")
    try:
        return load_file(path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error}", "check its permissions and the disk") from error
    except (SafetensorError, ValueError, KeyError) as error:
        if not is_pickled(path):
            raise EnvironmentFault(f"{path}: not a readable safetensors file: {error}", "copy or download it again") from error
        raise pickled(path) from error


def is_pickled(path: Path) -> bool:
    """By its name, or its first bytes: a zip of torch, or a bare pickle."""
    with path.open("rb") as file:
        return path.suffix in PICKLES or file.read(2).startswith((b"PK", b"\x80"))


def pickled(path: Path, to: Path | None = None) -> EnvironmentFault:
    """The refusal of a pickled checkpoint, with the line that converts it: beside itself, or `to` where it is looked for."""
    to = to or path.with_name(f"{path.stem}.converted.safetensors")
    return EnvironmentFault(
        f"{path}: is a pickled checkpoint; loading one can run any code, so lpvit reads safetensors only",
        f"convert: python -c \"import torch, safetensors.torch as s; c = torch.load('{path.absolute()}', weights_only=True); "
        "c = c.get('model', c.get('state_dict', c)); "
        f"s.save_file({{k: v.contiguous().clone() for k, v in c.items()}}, '{to.absolute()}', {{'format': 'pt'}})\"",
    )


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any other file (the library leaves it readable by its owner only)."""
    remove(path)  # where it is a link, what it points to is no business of ours
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def orders_as_metadata(orders: Mapping[str, Tensor]) -> dict[str, str]:
    return {ORDERS: json.dumps({name: order.tolist() for name, order in orders.items()})} if orders else {}


def orders_beside(path: Path) -> dict[str, Tensor]:
    """What modules gather in the model whose dense tensors a safetensors file holds: order [features] int64, by name."""
    with safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get(ORDERS, "{}"))
    return {name: torch.tensor(order) for name, order in told.items()}


def _load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors; every name and shape must agree."""
    expected = model.state_dict()
    missing = sorted(expected.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - expected.keys())
    shapes = [
        f"{k} {list(tensors[k].shape)} for {list(v.shape)}"
        for k, v in expected.items()
        if k in tensors and tensors[k].shape != v.shape
    ]
    for what, names in (("misses", missing), ("has foreign tensors", foreign), ("has other shapes", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EnvironmentFault(
                f"{path}: does not fit the model: {what}: {names[0]}{more}",
                "check model.name and model.kwargs against the weights",
            )
    model.load_state_dict(tensors)
