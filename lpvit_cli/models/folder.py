"""Model folders out and back.

A model folder holds `config.json` (architecture, preprocessing, sparsity) and `model.safetensors` (dense tensors named as
in timm; sparse layers packed as `<layer>.values`, `.row_ptr`, `.cols`; `<module>.order` where one gathers its features).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import create, name_of, resolve
from lpvit_cli.models.narrow import narrow, width
from lpvit_cli.models.order import gather_at
from lpvit_cli.models.ordered import ordered_modules
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import _load_strictly, orders_as_metadata, read_tensors, write_tensors
from lpvit_cli.recipe.code import allow_code
from lpvit_cli.recipe.model import Interpolation, ModelSection, Preprocess
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers
from lpvit_cli.tokens.blocks import Merging, install, merging_of

FORMAT = "lpvit-model"
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "exif", "label_names")


def model_config(section: ModelSection, model: VisionModel, **more: Any) -> dict[str, Any]:
    """What config.json says beside the sparsity: enough to build the model and to feed it, without the recipe or the hub."""
    return {
        **resolve(section),
        "num_classes": model.num_classes,
        "gives": model.gives,
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
    content.pop("ordered", None)
    if ordered := ordered_modules(model):
        content["ordered"] = ordered
    if merging := merging_of(model):
        content["tokens"] = merging.model_dump(mode="json")
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


def load_model(path: str | Path, trust_code: bool = False) -> VisionModel:
    """Read a model folder back, its pruned layers BlockSparseLinear, in eval mode on the CPU.

    `trust_code`: where the model is one of your own modules, import the function that the folder names; without it only
    functions that a recipe of this process names are. Raises UsageError when `path` is no model folder, or its code is not
    trusted, EnvironmentFault when its files are damaged or do not fit together.
    """
    folder = Path(path)
    config = read_config(folder)
    if trust_code and config.get("family") == "module":
        allow_code(config["architecture"])
    tensors = read_tensors(folder / "model.safetensors")
    damaged = f"{folder}: config.json and model.safetensors do not fit together"
    if config.get("family") == "module":
        model = create(config)  # what its code does wrong is no damage of the folder
    try:
        if config.get("family") != "module":
            model = create(config)
        if "tokens" in config:
            install(model, Merging.model_validate(config["tokens"]))
        for name in config.get("ordered", []):
            gather_at(model, name, tensors[f"{name}.order" if name else "order"])
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


def as_dense(source: Path, weights: Path) -> ModelSection:
    """The model folder `source` as a dense model; `weights` is written, with zeros for removed blocks. Features keep their
    order, so that these stay blocks: what the model gathers is told beside the tensors, which are those of its architecture."""
    config = read_config(source)
    model = densify(load_model(source))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    orders = {name: tensors.pop(f"{name}.order" if name else "order") for name in ordered_modules(model)}
    write_tensors(weights, tensors, orders_as_metadata(orders))
    given = config["preprocessing"]
    interpolation, names = given.get("interpolation"), given.get("label_names")
    classes = {"num_classes": config["num_classes"]} if config.get("family", "timm") == "timm" else {}
    return ModelSection(
        name=name_of(config),
        kwargs={**config["kwargs"], **classes},
        weights=weights,
        output=config.get("output"),
        label_names=tuple(names) if names and config["num_classes"] else None,
        preprocess=Preprocess(
            mean=given.get("mean"),
            std=given.get("std"),
            input_size=given.get("input_size"),
            crop_pct=given.get("crop_pct"),
            crop_mode=given.get("crop_mode"),
            interpolation=interpolation if interpolation in get_args(Interpolation) else None,
        ),
    )


def require_same_model(folder: Path, model: ModelSection) -> None:
    """Raise UsageError where the model folder holds another architecture than the recipe tells."""
    config = read_config(folder)
    wanted = json.loads(json.dumps(resolve(model)))
    found = {key: config.get(key, "timm") if key == "family" else config.get(key) for key in wanted}
    if found != wanted:
        raise UsageError(
            f"{folder} holds {_described(found)}, the recipe says {_described(wanted)}",
            "use the recipe it was made by, or make it again: lpvit run RECIPE",
        )


def _described(model: dict[str, Any]) -> str:
    return f"{model['architecture']} with {model['kwargs']}"
