"""Hugging Face transformers: vision models by hub id, local folder, or the name of their class.

Only classes that are part of the installed package are built, and only safetensors are read.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError, require
from lpvit_cli.files import read_json, reason
from lpvit_cli.models.families.checkpoint import (
    explained,
    file_of,
    is_class,
    quiet,
    refuse_pickles,
    refuse_sources,
    repository_of,
    revision_of,
    without_waiting,
)
from lpvit_cli.models.families.image_processor import preprocessing_of
from lpvit_cli.models.families.wrapper import Wrapper, give_once, pick
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import _load_strictly, read_header, read_tensors
from lpvit_cli.recipe.model import TRANSFORMERS, FeaturesKind, ModelSection, TaskKind

PREFIX = TRANSFORMERS
Tensors = dict[str, Tensor]
HEAD = "ForImageClassification"
HEADS = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill")
STAND_IN, STAND_IN_TAKES = "ViTForImageClassification", ("num_labels", "num_classes", "num_channels", "image_size")
NO_POOLER = "add_pooling_layer"  # the one argument of these classes that is no entry of their config
# entries of a config that say nothing about what the model computes, or follow from the others
FORGOTTEN = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "id2label",
    "label2id",
    "stage_names",
    "out_features",
    "out_indices",
    "problem_type",
    "auto_map",
}


class TransformersModel(Wrapper):
    """A transformers model that gives its logits, or embeddings: `output` where one is named, else

    pooled: `image_embeds` (CLIP's projection) or `pooler_output`, of models without a pooler the first token after the last
    norm; tokens: `last_hidden_state`.
    """

    def forward(self, images: Tensor) -> Tensor:
        result = self.model(images)
        if self.output is not None:
            return pick(result, self.output)
        if self.gives == "logits":
            return pick(result, "logits")
        if self.gives == "pooled":
            for name in ("image_embeds", "pooler_output"):
                if result.get(name) is not None:
                    return pick(result, name)
        tokens = pick(result, "last_hidden_state")
        return tokens if self.gives == "tokens" else tokens[:, 0]

    def get_classifier(self) -> Any:
        """The head of a classifier, the two of a distilled one; None where there is none."""
        heads = tuple(head for name in HEADS if (head := getattr(self.model, name, None)) is not None)
        return heads if len(heads) > 1 else next(iter(heads), None)


def build(section: ModelSection, task: TaskKind, features: FeaturesKind) -> VisionModel:
    """The model of a recipe; without `pretrained` and `weights` its weights are random.

    Raises UsageError (no vision model, unknown entries of the config), EnvironmentFault (not to be had, pickled, foreign).
    """
    architecture, kwargs = resolve(section)
    headed = HEAD in architecture and kwargs.get("num_labels", 0) > 0
    gives = "logits" if headed and task != "features" else features
    tensors = read_tensors(section.weights) if section.weights else {}
    if section.pretrained or (tensors and not _of_a_folder(tensors, architecture, kwargs, gives)):
        model = _wrapped(_with_weights(section, tensors, architecture, kwargs), architecture, gives, section.output)
    else:
        model = _wrapped(_random(architecture, kwargs), architecture, gives, section.output)
        if section.weights:
            _load_strictly(model, tensors, section.weights)
    source = section.name.removeprefix(PREFIX)
    model.pretrained_cfg = preprocessing_of(None if is_class(source) else source, kwargs, "image_size" in section.kwargs)
    names = _config_of(source).id2label if not is_class(source) else {}
    labels = [str(names[index]) for index in sorted(names)]
    if model.num_classes == len(labels) and any(label != f"LABEL_{index}" for index, label in enumerate(labels)):
        model.pretrained_cfg["label_names"] = labels
    return model


def resolve(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """The name of the class, and its config as a dict; `kwargs` of the recipe replace entries."""
    require("transformers", install="'lpvit[transformers]'")
    source, given = section.name.removeprefix(PREFIX), _with_num_labels(section.kwargs)
    if is_class(source):
        config = _vision_class(source).config_class(**_without(given, NO_POOLER))
        _require_known(given, config)
        return source, _entries(config) | {k: v for k, v in given.items() if k == NO_POOLER}
    config = _config_of(source)
    architecture, config = _vision_architecture(config, source)
    _require_known(given, config)
    with explained(section.name):
        entries = _entries(type(config)(**{**_entries(config), **_without(given, NO_POOLER)}))
    if _pools(architecture):
        entries[NO_POOLER] = given.get(NO_POOLER) if NO_POOLER in given else _has_pooler(section, architecture, entries)
    return architecture, entries


def create(config: Mapping[str, Any]) -> VisionModel:
    """The model of a config.json, with random weights."""
    require("transformers", install="'lpvit[transformers]'")
    architecture, kwargs = config["architecture"], config["kwargs"]
    return _wrapped(_random(architecture, kwargs), architecture, config["gives"], config.get("output"))


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Two layers (one for each stage), and images of few patches; without the hub a ViT stands in for what is not known."""
    source = section.name.removeprefix(PREFIX)
    with nullcontext(True) if is_class(source) or Path(source).is_absolute() else without_waiting() as known:
        try:
            architecture, kwargs = resolve(section)
        except EnvironmentFault:
            if known:
                raise
            given = {key: value for key, value in section.kwargs.items() if key in STAND_IN_TAKES}
            architecture, kwargs = resolve(ModelSection(name=PREFIX + STAND_IN, kwargs=given))
    small = dict(kwargs)
    if "depths" in small:
        small["depths"] = [1] * len(small["depths"])
    elif "num_hidden_layers" in small:
        small["num_hidden_layers"] = min(2, small["num_hidden_layers"])
    patch = small.get("patch_size", 16)
    smallest = patch if isinstance(patch, int) else max(patch)
    now = small.get("image_size", 224)
    for size in sorted({min(now if isinstance(now, int) else max(now), 64), 4 * smallest}):
        candidate = small | {"image_size": size}
        try:
            with torch.device("meta"):
                give_once(_random(architecture, candidate), (small.get("num_channels", 3), size, size))
        except LpvitError:
            continue
        return PREFIX + architecture, candidate
    return PREFIX + architecture, kwargs


def _wrapped(inner: Any, architecture: str, gives: str, output: str | int | None) -> VisionModel:
    """A classifier's base model where embeddings are wanted."""
    if gives == "logits":
        return TransformersModel(inner, output, gives, inner.config.num_labels).eval()
    inner = inner.base_model if HEAD in architecture else inner
    return TransformersModel(inner, output, gives, 0).eval()


def without_head(model: TransformersModel) -> VisionModel:
    """The base model of a classifier, for embeddings."""
    inner: Any = model.model
    bare = TransformersModel(inner.base_model, None, "pooled", 0).eval()
    bare.pretrained_cfg = model.pretrained_cfg
    return bare


def _of_a_folder(tensors: Tensors, architecture: str, kwargs: Mapping[str, Any], gives: str) -> bool:
    """Whether the tensors are those of a model folder of lpvit, which names them as the modules do."""
    with torch.device("meta"):
        return tensors.keys() == _wrapped(_random(architecture, kwargs), architecture, gives, None).state_dict().keys()


def _random(architecture: str, kwargs: Mapping[str, Any]) -> Any:
    kind = _vision_class(architecture)
    refuse_sources(kwargs)
    with explained(architecture):
        config = kind.config_class(**_without(kwargs, NO_POOLER))
        return kind(config, **_pooling(architecture, kwargs)).float()


def _with_weights(section: ModelSection, tensors: Tensors, architecture: str, kwargs: Mapping[str, Any]) -> Any:
    """Every tensor of the model from the checkpoint, but for a head of another number of classes, which is a new one."""
    source, kind = section.name.removeprefix(PREFIX), _vision_class(architecture)
    where: str = str(section.weights or source)
    options: dict[str, Any] = {"state_dict": tensors} if section.weights else {"use_safetensors": True}
    if not section.weights:
        if is_class(source):
            raise UsageError(
                f"model.name: {source} is a class, it has no weights of its own",
                "give weights: FILE, or transformers:OWNER/NAME",
            )
        refuse_pickles(source)
        options |= revision_of(source)
    with explained(section.name), quiet():
        config = kind.config_class(**_without(kwargs, NO_POOLER))
        model, found = kind.from_pretrained(
            None if section.weights else repository_of(source),
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **_pooling(architecture, kwargs),
            **options,
        )
    new_head = section.pretrained and {"num_labels", "num_classes"} & section.kwargs.keys()
    missing = [name for name in found["missing_keys"] if not (new_head and "classifier" in name)]
    shapes = [one[0] if isinstance(one, tuple) else one for one in found["mismatched_keys"]]
    shapes = [name for name in shapes if not (new_head and "classifier" in name)]
    foreign = [] if section.pretrained else [name for name in found["unexpected_keys"] if "classifier" not in name]
    for what, names in (("misses", missing), ("has other shapes", shapes), ("has foreign tensors", foreign)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise EnvironmentFault(
                f"{where}: does not fit {architecture}: {what}: {min(names)}{more}",
                "check model.name and model.kwargs against the weights",
            )
    return model


def _vision_architecture(config: Any, source: str) -> tuple[str, Any]:
    """The class that a checkpoint is built as, and its config: the vision tower of a model of images and text.

    Raises UsageError for what is no vision model.
    """
    import transformers

    named = (config.architectures or [None])[0]
    if hasattr(config, "vision_config") and not (named and HEAD in named):
        config, named = config.vision_config, None
    if named is None or named.endswith("ForMaskedImageModeling"):  # its encoder is what is left of it
        try:
            kind: Any = transformers.AutoModel._model_mapping[type(config)]
            named = str(kind.__name__)
        except KeyError:
            named = type(config).__name__
    _vision_class(named, source)
    return named, config


def _vision_class(name: str, source: str = "") -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    where = f"{source}: {name}" if source else name
    kinds = "it takes *Model, *ModelWithProjection and *ForImageClassification of vision transformers"
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UsageError(f"model.name: {where} is no model of the installed transformers {transformers.__version__}", kinds)
    fits = HEAD in name or name.endswith(("Model", "ModelWithProjection"))
    if kind.main_input_name != "pixel_values" or not fits or name.startswith(("Siglip2Vision", "ViTMAE")):
        raise UsageError(f"model.name: {where} is no model that makes logits or embeddings of one image", kinds)
    return kind


def _config_of(source: str) -> Any:
    from transformers import AutoConfig

    with explained(PREFIX + source), quiet():
        return AutoConfig.from_pretrained(repository_of(source), trust_remote_code=False, **revision_of(source))


def _entries(config: Any) -> dict[str, Any]:
    """A config as a dict that builds it again, without names of files and hubs."""
    entries = {key: value for key, value in config.to_dict().items() if key not in FORGOTTEN}
    return {**entries, "num_labels": config.num_labels}


def _require_known(given: Mapping[str, Any], config: Any) -> None:
    for key in given:
        if key != NO_POOLER and not hasattr(config, key):
            near = difflib.get_close_matches(key, config.to_dict(), n=3)
            raise UsageError(
                f"model.kwargs: {type(config).__name__} has no entry {key!r}",
                f"did you mean {', '.join(near)}?" if near else "see the model's config.json",
            )


def _with_num_labels(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`num_classes` means `num_labels` here."""
    return {"num_labels" if key == "num_classes" else key: value for key, value in kwargs.items() if key != "model_type"}


@cache
def _pools(architecture: str) -> bool:
    """Whether the class may be built without a pooler, which many checkpoints do not have."""
    import inspect

    return NO_POOLER in inspect.signature(_vision_class(architecture).__init__).parameters


def _pooling(architecture: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {NO_POOLER: kwargs[NO_POOLER]} if NO_POOLER in kwargs and _pools(architecture) else {}


def _has_pooler(section: ModelSection, architecture: str, entries: Mapping[str, Any]) -> bool:
    """False where the class has a pooler with weights, and the checkpoint none for it: they would be random."""
    if not (section.pretrained or section.weights):
        return True
    with torch.device("meta"):
        weighs = any("pooler." in name for name in _random(architecture, entries).state_dict())
    return not weighs or any("pooler." in name for name in _tensor_names(section))


def _tensor_names(section: ModelSection) -> list[str]:
    """Of a checkpoint, without reading its tensors."""
    if section.weights:
        return list(read_tensors(section.weights))
    source = section.name.removeprefix(PREFIX)
    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = file_of(source, file)
        if path and file.endswith(".json"):
            return _indexed_names(path)
        if path:
            return list(read_header(path))
    refuse_pickles(source)
    raise EnvironmentFault(f"model.name: {source}: there is no model.safetensors", "check the name, or give weights: FILE")


def _indexed_names(path: Path) -> list[str]:
    try:
        return list(read_json(path)["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EnvironmentFault(f"{path}: no index of weights: {reason(error)}", "copy or download it again") from error


def _without(kwargs: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in (*names, "model_type")}
