"""Adapters apart from their base: adapter.safetensors with adapter_config.json, in the names that peft reads.

The product in the file is relative to the pruned model as it is on disk: where LoRA-GA's start was absorbed by W0, the factors
hold it too, with the opposite sign, at twice the rank. Factors are scaled so that the product is B A (peft: lora_alpha = r).
What peft cannot know is the mask: outside of it B A is not zero, and lpvit never forms it there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import reason, replace_text, sha256_of
from lpvit_cli.models.folder import load_model
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import require_finite, write_tensors
from lpvit_cli.recovery.lora.layers import adapt, adapters_of
from lpvit_cli.sparse import sparse_layers

ADAPTER, CONFIG = "adapter.safetensors", "adapter_config.json"
FORMAT = "lpvit-adapter"
PREFIX = "base_model.model."
FACTORS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


def save_adapter(folder: Path, model: nn.Module, base: Path) -> None:
    """Write the adapters of `model`, and what else training has changed over the model folder `base`: what requires a gradient,
    and buffers such as the statistics of BatchNorm."""
    factors = {name: adapter.factors() for name, adapter in adapters_of(model).items()}
    tensors = {f"{PREFIX}{name}{FACTORS['A']}": a for name, (a, _) in factors.items()}
    tensors |= {f"{PREFIX}{name}{FACTORS['B']}": b for name, (_, b) in factors.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith((".lora_a", ".lora_b")):
            tensors[PREFIX + name.replace(".base.", ".base_layer.")] = parameter
    before, adapters = load_file(base / "model.safetensors"), tuple(f"{name}." for name in adapters_of(model))
    for name, buffer in model.named_buffers():  # those of adapted layers are start factors and indices
        if name in before and not name.startswith(adapters) and not torch.equal(buffer.cpu(), before[name]):
            tensors[PREFIX + name] = buffer
    described = {"format": FORMAT, "base": _digest(base)}
    write_tensors(folder / ADAPTER, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, described)
    ranks = {name: len(a) for name, (a, _) in factors.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    replace_text(folder / CONFIG, json.dumps(config, indent=1))


def load_adapted(base: Path, adapter: Path) -> VisionModel:
    """The pruned model folder `base` with the adapter on it, not merged; frozen, in eval mode, on the CPU.

    Raises UsageError for an adapter of another model, EnvironmentFault for an unreadable one.
    """
    path = adapter / ADAPTER if adapter.is_dir() else adapter
    tensors, made_for = _read(path)
    model = load_model(base)
    if made_for != _digest(base):
        raise UsageError(
            f"{path}: was made for another pruned model than {base}",
            "give the model folder that was recovered (its config: adapter_config.json, base_model_name_or_path)",
        )
    factors = _factors(path, tensors)
    layers, places = sparse_layers(model), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {name.replace(".base_layer.", "."): t for name, t in tensors.items() if not name.endswith(tuple(FACTORS.values()))}
    if foreign := sorted((factors.keys() - layers.keys()) | (others.keys() - places.keys())):
        raise EnvironmentFault(f"{path}: {foreign[0]} is not in {base}", "copy the adapter again, or recover again")
    for name, (a, b) in factors.items():
        rank, ends = a.shape[0] if a.ndim else 0, (layers[name].out_features, layers[name].in_features)
        if not rank or (b.shape, a.shape) != ((ends[0], rank), (rank, ends[1])) or not a.dtype == b.dtype == torch.float32:
            raise EnvironmentFault(f"{path}: factors of {name} do not fit the layer", "copy the adapter again")
    for name, tensor in others.items():
        if tensor.shape != places[name].shape or tensor.dtype != places[name].dtype:
            raise EnvironmentFault(
                f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, the model's {places[name].dtype} "
                f"{list(places[name].shape)}",
                "copy the adapter again",
            )
    require_finite(tensors.items(), path)
    with torch.no_grad():
        for name, tensor in others.items():
            places[name].copy_(tensor)
        for name, (a, b) in factors.items():
            made = adapt(model, {name: len(a)}, alpha=len(a) ** 0.5)[name]
            made.lora_a.copy_(a)
            made.lora_b.copy_(b)
    return model.requires_grad_(False).eval()


def _factors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by layer. Raises EnvironmentFault where one is missing."""
    named = {which: {n.removesuffix(end): t for n, t in tensors.items() if n.endswith(end)} for which, end in FACTORS.items()}
    if alone := sorted(named["A"].keys() ^ named["B"].keys()):
        raise EnvironmentFault(f"{path}: one of the two factors of {alone[0]} is missing", "copy the adapter again")
    return {name: (a, named["B"][name]) for name, a in named["A"].items()}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors by their names in the model, and what identifies the base."""
    if not path.is_file():
        raise UsageError(f"{path}: no such adapter", f"give a recovered folder, or an {ADAPTER}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UsageError(f"{path}: not an adapter made by lpvit", "give one that finetune-lora-ga wrote")
            return {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}, metadata["base"]  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise EnvironmentFault(f"{path}: unreadable: {reason(error)}", "copy it again, or recover again") from error


def _digest(base: Path) -> str:
    return sha256_of(base / "model.safetensors")[:16]
