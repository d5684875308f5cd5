"""timm models in, model folders out and back.

A model folder holds `config.json` (architecture, preprocessing, sparsity) and `model.safetensors` (dense tensors named as
in timm; sparse layers packed as `<layer>.values`, `.row_ptr`, `.cols`). Pickles are refused, never loaded.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, cast

import timm
import torch
from lpvit_kernels import BlockSparseMatrix
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.recipe import Layers, ModelSection, Recipe
from lpvit_cli.sparse import BlockSparseLinear, narrow, sparse_layers, width

FORMAT = "lpvit-model"
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names")
PICKLES = (".pth", ".pt", ".bin", ".pkl", ".ckpt", ".tar")


class VisionModel(nn.Module):
    """What every timm model has besides being a module; for the type checker, and for models that are not timm's."""

    num_classes: int
    pretrained_cfg: dict[str, Any]  # preprocessing: input_size (C, H, W), mean, std, interpolation, crop_pct ...


def build_model(section: ModelSection) -> VisionModel:
    """The dense timm model of a recipe, in eval mode on the CPU; its preprocessing is in `model.pretrained_cfg`.

    Raises UsageError (unknown model or argument), EnvironmentFault (weights not to be had, unreadable, foreign).
    """
    model = _create(section.name, section.kwargs, section.pretrained or section.name.startswith("hf-hub:"))
    preprocess = {k: v for k, v in section.preprocess.model_dump().items() if v is not None}
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": _input_size(model, section.kwargs), **preprocess}
    if section.weights:
        _load_strictly(model, read_tensors(section.weights), section.weights)
    return model.eval()


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the same architecture with little depth and small images, for smoke runs."""
    name = section.name.removeprefix("hf-hub:").split("/")[-1]
    candidates: list[dict[str, Any]] = [
        {"img_size": 64, "depth": 2},
        {"img_size": 64, "depths": (1, 1, 1, 1)},
        {"img_size": 64},
        {},
    ]
    size = section.kwargs.get("img_size") or 65
    if (size if isinstance(size, int) else max(size)) <= 64:
        candidates = [{"depth": 2}, *candidates[2:]]
    for candidate in candidates:
        kwargs = {**section.kwargs, **candidate}
        try:
            with torch.device("meta"):
                timm.create_model(name, **kwargs)
        except (TypeError, AssertionError, ValueError, RuntimeError, IndexError):
            continue
        return name, kwargs
    return name, section.kwargs  # let building it explain what is wrong


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


def device_of(recipe: Recipe) -> torch.device:
    return pick_device(recipe.device)


def pick_device(name: str) -> torch.device:
    """The device of that name; with several processes on a machine, `auto` and `cuda` are the GPU of this one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and distributed.world() > 1:
        if name != "cuda":
            raise UsageError(f"device {name!r}: under torchrun each process has a GPU of its own", "use --device cuda")
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is not a torch device", "use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EnvironmentFault(f"device {name!r}: this machine has {count} usable CUDA devices", "see: lpvit doctor")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type; weights stay in float32 and are cast on the way (autocast)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def bench_dtypes(recipe: Recipe, device: torch.device) -> list[torch.dtype]:
    """The compute types that bench measures, each once; profile and sweep take the first."""
    return list(dict.fromkeys(pick_dtype(name, device) for name in recipe.bench.dtypes or (recipe.dtype,)))


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from lpvit_cli.measure.machine import cpu_name

    return f"{cpu_name()}, {torch.get_num_threads()} threads"


# model folders


def model_config(section: ModelSection, model: VisionModel, **more: Any) -> dict[str, Any]:
    """What config.json says beside the sparsity: enough to build the model and to feed it, without the recipe."""
    return {
        "architecture": section.name.removeprefix("hf-hub:").split("/")[-1],
        "kwargs": section.kwargs,
        "num_classes": model.num_classes,
        "preprocessing": {k: v for k, v in model.pretrained_cfg.items() if k in PREPROCESSING},
        **more,
    }


def save_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write a model folder; asserts that the indices of every sparse layer hold."""
    widths = {name: kept for name, module in model.named_modules() if (kept := width(module)) is not None}
    sparsity = {}
    for name, layer in sparse_layers(model).items():
        weight = BlockSparseMatrix(layer.values.detach(), layer.row_ptr, layer.cols, (layer.out_features, layer.in_features))
        blocks = weight.block_mask.numel()
        sparsity[name] = {
            "shape": list(weight.shape),
            "block": list(weight.values.shape[1:]),
            "blocks": blocks,
            "kept": len(weight.cols),
        }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    content = {"format": FORMAT, "format_version": 1, **config, "widths": widths, "sparsity": sparsity}
    (folder / "config.json").write_text(json.dumps(content, indent=1))


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ValueError("not an lpvit model")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{folder}: no config.json there", "give a model folder, such as runs/NAME/pruned") from error
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{path}: unreadable: {error}", "make the model folder again with `lpvit run`") from error
    return config


def load_model(path: str | Path) -> VisionModel:
    """Read a model folder back: a timm model, its pruned layers BlockSparseLinear, in eval mode on the CPU.

    Raises UsageError when `path` is no model folder, EnvironmentFault when its files are damaged or do not fit together.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = read_tensors(folder / "model.safetensors")
    damaged = f"{folder}: config.json and model.safetensors do not fit together"
    try:
        model = _create(config["architecture"], config["kwargs"], pretrained=False)
        model.pretrained_cfg = {**model.pretrained_cfg, **config["preprocessing"]}
        for name, kept in config.get("widths", {}).items():
            whole = width(model.get_submodule(name))
            if whole is None or type(kept) is not int or not 0 < kept <= whole:
                raise ValueError(f"{name}: config.json says {kept} neurons or heads, the architecture has {whole}")
            if kept < whole:
                narrow(model.get_submodule(name), torch.arange(kept))
        for name, layer in config["sparsity"].items():
            values = tensors[f"{name}.values"]
            if list(values.shape[1:]) != layer["block"]:
                raise ValueError(f"{name}: blocks of {list(values.shape[1:])}, config.json says {layer['block']}")
            dense = model.get_submodule(name)
            if not isinstance(dense, nn.Linear) or list(dense.weight.shape) != layer["shape"]:
                raise ValueError(f"{name}: config.json says {layer['shape']}, the architecture something else")
            weight = BlockSparseMatrix(values, tensors[f"{name}.row_ptr"], tensors[f"{name}.cols"], tuple(layer["shape"]))
            model.set_submodule(name, BlockSparseLinear(weight, dense.bias))
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise EnvironmentFault(f"{damaged}: {error}", "make the model folder again with `lpvit run`") from error
    _load_strictly(model, tensors, folder / "model.safetensors")
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file. Pickled checkpoints run code when loaded, so they are refused with the way to convert them."""
    if not path.is_file():
        raise UsageError(f"{path}: no such weights file", "check the path; in a recipe it is relative to the recipe's folder")
    try:
        return load_file(path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error}", "check its permissions and the disk") from error
    except (SafetensorError, ValueError, KeyError) as error:
        with path.open("rb") as file:
            head = file.read(2)
        if path.suffix not in PICKLES and not head.startswith((b"PK", b"\x80")):
            raise EnvironmentFault(f"{path}: not a readable safetensors file: {error}", "copy or download it again") from error
        convert = f"torch.load('{path.name}', weights_only=True)"
        raise EnvironmentFault(
            f"{path}: is a pickled checkpoint; loading one can run any code, so lpvit reads safetensors only",
            f'convert: python -c "import torch, safetensors.torch as s; c = {convert}; '
            f"s.save_file(c.get('model', c.get('state_dict', c)), '{path.stem}.converted.safetensors')\"",
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of any other file (the library leaves it readable by its owner only)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def _create(name: str, kwargs: dict[str, Any], pretrained: bool) -> VisionModel:
    hub = name.startswith("hf-hub:")
    if not hub and not _exists(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise UsageError(
            f"model.name: timm has no model {name!r}",
            f"did you mean {', '.join(near)}?" if near else "list them: python -c 'import timm; print(timm.list_models())'",
        )
    try:
        model = cast(VisionModel, timm.create_model(name, pretrained=pretrained, **kwargs))
    except Exception as error:  # the hub client and timm raise many kinds; each means: these weights or arguments do not work
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"
        if pretrained:
            from_file = "pass the file: --set model.pretrained=false --set model.weights=FILE.safetensors"
            raise EnvironmentFault(
                f"model.name: cannot get the pretrained weights of {name!r} ({reason})",
                f"connect to the hub once, or {'give a timm name and ' if hub else ''}{from_file}",
            ) from error
        raise UsageError(
            f"model.kwargs: timm cannot build {name!r} with {kwargs} ({reason})", "correct model.kwargs"
        ) from error
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UsageError(f"model.name: {name!r} has no linear layers to prune", "choose a vision transformer")
    return model


def _exists(name: str) -> bool:
    architecture, _, tag = name.partition(".")
    return timm.is_model(architecture) and (not tag or name in timm.list_pretrained(architecture + "*"))


def _input_size(model: VisionModel, kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """timm does not write img_size back into the model's configuration."""
    size = kwargs.get("img_size")
    if size is None:
        channels, height, width = model.pretrained_cfg["input_size"]
        return channels, height, width
    height, width = (size, size) if isinstance(size, int) else size
    return 3, height, width


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
