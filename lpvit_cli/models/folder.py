"""Model folders out and back.

A model folder holds `config.json` (architecture, preprocessing, sparsity) and `model.safetensors` (dense tensors named as
in timm; sparse layers packed as `<layer>.values`, `.row_ptr`, `.cols`; `<module>.order` where one gathers its features).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.files import reason, replace_text, sha256_of
from lpvit_cli.models.build import create, name_of, resolve
from lpvit_cli.models.config_file import FORMAT, PREPROCESSING, ModelConfig, require_valid
from lpvit_cli.models.config_file import read_config as read_config
from lpvit_cli.models.fit import require_layer, require_one_model, require_output
from lpvit_cli.models.narrow import narrow_to, width
from lpvit_cli.models.order import gather_at
from lpvit_cli.models.ordered import ordered_modules
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import _load_strictly, orders_as_metadata, read_header, read_tensors, write_tensors
from lpvit_cli.recipe.code import allow_code
from lpvit_cli.recipe.model import ModelSection, Preprocess
from lpvit_cli.sparse import BlockSparseLinear, densify, sparse_layers
from lpvit_cli.tokens.blocks import Merging, install, merging_of


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
    """Write a model folder; asserts that the indices of every sparse layer hold. Raises UsageError, before it writes, where
    `load_model` would refuse what config.json is to say."""
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
    content = {"format": FORMAT, "format_version": 1, **config, "widths": widths, "sparsity": sparsity}
    content.pop("ordered", None)
    if ordered := ordered_modules(model):
        content["ordered"] = ordered
    if merging := merging_of(model):
        content["tokens"] = merging.model_dump(mode="json")
    content.pop("sha256", None)
    try:
        require_valid(ModelConfig, content)
    except ValueError as error:
        raise UsageError(f"{folder}: the model cannot be described: {reason(error)}", "change `model` in the recipe") from error
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    content["sha256"] = sha256_of(folder / "model.safetensors")
    replace_text(folder / "config.json", json.dumps(content, indent=1))


def load_model(path: str | Path, trust_code: bool = False) -> VisionModel:
    """Read a model folder back, its pruned layers BlockSparseLinear, in eval mode on the CPU.

    `trust_code`: where the model is one of your own modules, import the function that the folder names; without it only
    functions that a recipe of this process names are. Raises UsageError when `path` is no model folder, or its code is not
    trusted, EnvironmentFault when its files are damaged or do not fit together, or a weight is NaN or infinite.
    """
    folder = Path(path)
    config, weights = read_config(folder), folder / "model.safetensors"
    own_code = config.get("family") == "module"
    if trust_code and own_code:
        allow_code(config["architecture"])
    header = read_header(weights)
    require_unchanged(weights, config)
    if own_code:
        model = create(config)  # what its code does wrong is no damage of the folder
    try:
        seen = not own_code and require_one_model(config, header, weights)
        tensors = read_tensors(weights)
        if not own_code:
            model = create(config)
        _assemble(model, config, tensors)
        _load_strictly(model, tensors, weights)
        if not seen or "tokens" in config:
            require_output(model.eval(), config)
    except EnvironmentFault:
        raise
    except Exception as error:  # libraries raise any kind for arguments that their architectures do not take
        raise EnvironmentFault(
            f"{folder}: config.json and model.safetensors do not fit together: {reason(error)}",
            "make the model folder again with `lpvit run`",
        ) from error
    return model.eval()


def _assemble(model: VisionModel, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Make a dense model, in place, what config.json says: where tokens merge, its order, its widths, its block-sparse
    layers."""
    if "tokens" in config:
        install(model, Merging.model_validate(config["tokens"]))
    for name in config.get("ordered", []):
        gather_at(model, name, tensors[f"{name}.order" if name else "order"])
    narrow_to(model, config.get("widths", {}))
    for name, layer in config["sparsity"].items():
        values, dense = tensors[f"{name}.values"], cast(nn.Linear, model.get_submodule(name))
        require_layer(name, layer, values, dense)
        if values.is_floating_point():
            values = values.to(dense.weight.dtype)
        weight = BlockSparseMatrix(values, tensors[f"{name}.row_ptr"], tensors[f"{name}.cols"], tuple(layer["shape"]))
        model.set_submodule(name, BlockSparseLinear(weight, dense.bias))


def require_unchanged(weights: Path, config: dict[str, Any]) -> None:
    """Raise EnvironmentFault where the weights are not those that config.json was written for; folders of lpvit 0.2 do
    not say."""
    if config.get("sha256") not in (None, sha256_of(weights)):
        raise EnvironmentFault(
            f"{weights}: is not the file that config.json was written for: its checksum differs",
            "copy the whole folder again, or make it again with `lpvit run`",
        )


def as_dense(source: Path, weights: Path) -> ModelSection:
    """The model folder `source` as a dense model; `weights` is written, with zeros for removed blocks. Features keep their
    order, so that these stay blocks: what the model gathers is told beside the tensors, which are those of its architecture."""
    config = read_config(source)
    model = densify(load_model(source))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    orders = {name: tensors.pop(f"{name}.order" if name else "order") for name in ordered_modules(model)}
    write_tensors(weights, tensors, orders_as_metadata(orders))
    given = config["preprocessing"]
    names = given.get("label_names")
    classes = {"num_classes": model.num_classes} if config.get("family", "timm") == "timm" else {}
    return ModelSection(
        name=name_of(config),
        kwargs={**config["kwargs"], **classes},
        weights=weights,
        output=config.get("output"),
        label_names=tuple(names) if names and model.num_classes else None,
        preprocess=Preprocess(
            mean=given.get("mean"),
            std=given.get("std"),
            input_size=given.get("input_size"),
            crop_pct=given.get("crop_pct"),
            crop_mode=given.get("crop_mode"),
            interpolation=given.get("interpolation"),
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
