"""safetensors files in and out. Pickles are refused, never loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import parse_json, reason, require_regular, whole

ORDERS = "lpvit_orders"  # in the metadata of dense weights: what modules gather, by name
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what is wrong with a safetensors file into an error a user can act on."""
    try:
        require_regular(path)
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) or path.is_dir():
            raise UsageError(
                f"{path}: no such weights file", "check the path; in a recipe it is relative to the recipe's folder"
            ) from error
        raise EnvironmentFault(f"{path}: cannot be read: {reason(error)}", "check its permissions and the disk") from error
    except (SafetensorError, ValueError, KeyError) as error:
        if not path.is_file() or not is_pickled(path):
            raise EnvironmentFault(
                f"{path}: not a readable safetensors file: {reason(error)}", "copy or download it again"
            ) from error
        raise pickled(path) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Pickled checkpoints run code when loaded, so they are refused with the way to convert them."""
    with reading(path):
        return load_file(path)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: their shapes and types, without their values."""
    with reading(path), safe_open(path, "pt") as file:
        header = {}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(name)
            if (dtype := DTYPES.get(part.get_dtype())) is None:
                raise ValueError(f"{name} is of type {part.get_dtype()}, which no model of lpvit has")
            header[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return header


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
    """A safetensors file, whole or not at all, with the permissions of any other file (the library leaves it readable by its
    owner only). A link is replaced, what it points to stays."""
    with whole(path) as partial:
        partial.touch()
        mode = (path if path.is_file() and not path.is_symlink() else partial).stat().st_mode
        save_file(tensors, partial, metadata)
        partial.chmod(mode)


def orders_as_metadata(orders: Mapping[str, Tensor]) -> dict[str, str]:
    return {ORDERS: json.dumps({name: order.tolist() for name, order in orders.items()})} if orders else {}


def orders_beside(path: Path) -> dict[str, Tensor]:
    """What modules gather in the model whose dense tensors a safetensors file holds: order [features] int64, by name."""
    with reading(path), safe_open(path, "pt") as file:
        told = parse_json((file.metadata() or {}).get(ORDERS, "{}"))
        if not isinstance(told, dict):
            raise ValueError(f"its metadata {ORDERS} are no orders by name")
        return {name: torch.tensor(_whole_numbers(order)) for name, order in told.items()}


def _whole_numbers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise ValueError(f"its metadata {ORDERS} hold no order")
    return values


def require_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raise EnvironmentFault unless tensors have the names, the shapes and the kinds of types that are expected.

    Only these are looked at: both may be on the meta device. Among floating types any will do, loading converts it.
    """
    missing = sorted(expected.keys() - tensors.keys())
    foreign = sorted(tensors.keys() - expected.keys())
    both = [(name, tensors[name], value) for name, value in expected.items() if name in tensors]
    shapes = [f"{name} {list(a.shape)} for {list(b.shape)}" for name, a, b in both if a.shape != b.shape]
    types = [
        f"{name} {a.dtype} for {b.dtype}"
        for name, a, b in both
        if a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point())
    ]
    for what, names in (
        ("misses", missing),
        ("has foreign tensors", foreign),
        ("has other shapes", shapes),
        ("has other types", types),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EnvironmentFault(
                f"{path}: does not fit the model: {what}: {names[0]}{more}",
                "check model.name and model.kwargs against the weights",
            )


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: object) -> None:
    """Raise EnvironmentFault where a weight is NaN or infinite."""
    for name, tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(limit.isfinite() for limit in tensor.detach().aminmax()):  # NaN goes through to both
            raise EnvironmentFault(
                f"{where}: {name} holds NaN or infinite values", "copy or download the file again, or train the model anew"
            )


def _load_strictly(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors; every name and shape must agree, every parameter must be finite."""
    require_fit(tensors, model.state_dict(), path)
    model.load_state_dict(tensors)
    require_finite(model.named_parameters(), path)
