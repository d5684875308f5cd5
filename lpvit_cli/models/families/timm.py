"""timm models: by name, with their weights, and small for rehearsals."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg, load_model_config_from_hf
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.families.checkpoint import quiet_hub, refuse_sources, without_waiting
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.models.tensors import _load_strictly, read_tensors
from lpvit_cli.recipe.model import FeaturesKind, ModelSection, TaskKind

PREFIX = ""
DEPTHS: tuple[dict[str, Any], ...] = (  # of small copies: as many stages as an architecture has, of one block each
    {"depth": 2},
    {"depths": (1, 1, 1, 1)},
    {"depths": (1, 1, 1)},
    {"depths": (1, 1)},
    {"stages": (1, 1, 1, 1)},
    {},
)
HUB = "hf-hub:"  # owner/name, and @revision where one is meant


class Tokens(nn.Module):
    """A map of features [n, C, H, W] or [n, H, W, C] as tokens [n, H * W, C]; tokens stay as they are. In place of a head."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return x
        return x.flatten(1, 2) if x.shape[-1] == self.features else x.flatten(2).transpose(1, 2)


def build(section: ModelSection, task: TaskKind, features: FeaturesKind) -> VisionModel:
    """The dense timm model of a recipe, in eval mode on the CPU; its preprocessing is in `model.pretrained_cfg`.

    Raises UsageError (unknown model, argument or output), EnvironmentFault (weights not to be had, unreadable, foreign).
    """
    if section.output is not None:
        raise UsageError(
            f"model.output: {section.output!r}, but models of timm give one tensor, and nothing to choose from", "leave it out"
        )
    model = _made(section.name, section.kwargs, section.pretrained or section.name.startswith(HUB))
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": _input_size(model, resolve(section)[1])}
    if section.weights:
        tensors = _with_positions(model, _without_a_head(model, read_tensors(section.weights)))
        _load_strictly(model, tensors, section.weights)
    _give(model, features if task == "features" or model.num_classes == 0 else "logits")
    return model.eval()


def create(config: Mapping[str, Any]) -> VisionModel:
    """The architecture of a config.json, with random weights. Folders of lpvit 0.2 do not say what they give: logits."""
    if config["architecture"].startswith(HUB):
        raise UsageError("config.json names a repository, and opening a folder asks no hub", "name the architecture")
    model = _made(config["architecture"], config["kwargs"], pretrained=False)
    _give(model, config.get("gives", "logits"))
    return model


def _without_a_head(model: VisionModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of a classifier, where the model has none."""
    named = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([named] if isinstance(named, str) else named))
    expected = model.state_dict().keys()
    return {n: t for n, t in tensors.items() if model.num_classes or n in expected or not n.startswith(heads)}


def _with_positions(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the position embeddings [1, n, d] of a square grid resampled to the model's, as timm does on loading."""
    theirs, ours = (held.get("pos_embed", torch.empty(0)) for held in (tensors, model.state_dict()))
    if theirs.ndim != 3 or ours.ndim != 3 or theirs.shape == ours.shape or theirs.shape[2] != ours.shape[2]:
        return tensors
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None or math.isqrt(theirs.shape[1] - prefix) ** 2 != theirs.shape[1] - prefix:
        return tensors
    return {**tensors, "pos_embed": resample_abs_pos_embed(theirs, list(grid), num_prefix_tokens=prefix)}


def _give(model: Any, output: str) -> None:
    """Make the model, in place, give its `logits`, or without a head its `pooled` embedding or all `tokens`.

    Raises UsageError where the architecture cannot give its tokens.
    """
    if output == "pooled" and model.num_classes:
        model.reset_classifier(0)
    if output == "tokens":
        try:
            model.reset_classifier(0, "")
            last = model.get_classifier()  # what it applied to the embedding of an image, nothing now
        except (TypeError, AssertionError, AttributeError) as error:
            raise UsageError(
                f"features: tokens: {type(model).__name__} cannot give all its tokens", "use --set features=pooled"
            ) from error
        for head in last if isinstance(last, tuple) else (last,):
            name = next((name for name, module in model.named_modules() if module is head), None)
            if name:
                model.set_submodule(name, Tokens(model.num_features))
    model.gives = output


def resolve(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture and the arguments that build it: of a model from the hub, without the hub.

    The arguments are the recipe's, then those of the hub's config.json, then what follows from its preprocessing.
    Raises EnvironmentFault when the hub's config.json is not to be had.
    """
    if not section.name.startswith(HUB):
        return section.name, section.kwargs
    try:
        with quiet_hub():
            hubs, architecture, arguments = load_model_config_from_hf(section.name.removeprefix(HUB))
        config = PretrainedCfg(**hubs)
    except Exception as error:  # as in _made
        raise _not_to_be_had(section.name, error) from error
    channels, *size = config.input_size
    implied: dict[str, Any] = {"num_classes": config.num_classes}  # by what is no argument, as timm takes it
    implied |= {"in_chans": channels} if channels != 3 else {}
    implied |= {"img_size": size} if config.fixed_input_size else {}
    return architecture, {**implied, **(arguments or {}), **section.kwargs}


def shrink(section: ModelSection) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the same architecture with little depth and small images, for smoke runs."""
    try:
        with without_waiting() if section.name.startswith(HUB) else nullcontext():
            name, given = resolve(section)
    except EnvironmentFault:  # a rehearsal needs no weights, and many repositories are called as their architecture is
        name, given = section.name.split("/")[-1], section.kwargs
        if not _exists(name):
            raise
    size = given.get("img_size") or 65
    sizes = [{}] if (size if isinstance(size, int) else max(size)) <= 64 else [{"img_size": 64}, {"img_size": 128}, {}]
    for smaller in sizes:
        for depth in DEPTHS:
            kwargs = {**given, **smaller, **depth}
            if _runs(name, kwargs):
                return name, kwargs
    return name, given  # let building it explain what is wrong


def _runs(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether timm builds it, and an image goes through, on the meta device."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = cast(VisionModel, timm.create_model(name, **kwargs)).eval()
            model(torch.zeros(1, *_input_size(model, kwargs)))
    except Exception:  # timm raises many kinds, of arguments that an architecture does not take
        return False
    return True


def _made(name: str, kwargs: dict[str, Any], pretrained: bool) -> VisionModel:
    hub = name.startswith(HUB)
    if not hub and not _exists(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        raise UsageError(
            f"model.name: timm has no model {name!r}",
            f"did you mean {', '.join(near)}?" if near else "list them: python -c 'import timm; print(timm.list_models())'",
        )
    refuse_sources(kwargs)
    try:
        with quiet_hub():
            model = cast(VisionModel, timm.create_model(name, pretrained=pretrained, **kwargs))
    except Exception as error:  # the hub client and timm raise many kinds; each means: these weights or arguments do not work
        if pretrained:
            raise _not_to_be_had(name, error) from error
        raise UsageError(
            f"model.kwargs: timm cannot build {name!r} with {kwargs} ({_reason(error)})", "correct model.kwargs"
        ) from error
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "qkv_bias_separate")]
    for part in parts:  # of BEiT, EVA-02 and Swin v2: call qkv as a module, and add its bias afterwards
        part.qkv_bias_separate = True
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        raise UsageError(f"model.name: {name!r} has no linear layers to prune", "choose a vision transformer")
    return model


def _not_to_be_had(name: str, error: Exception) -> EnvironmentFault:
    from_file = "pass the file: --set model.pretrained=false --set model.weights=FILE.safetensors"
    return EnvironmentFault(
        f"model.name: cannot get the pretrained weights of {name!r} ({_reason(error)})",
        f"connect to the hub once, or {'give a timm name and ' if name.startswith(HUB) else ''}{from_file}",
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"


def _exists(name: str) -> bool:
    architecture, _, tag = name.partition(".")
    return timm.is_model(architecture) and (not tag or name in timm.list_pretrained(architecture + "*"))


def _input_size(model: VisionModel, kwargs: dict[str, Any]) -> tuple[int, int, int]:
    """timm does not write img_size and in_chans back into the model's configuration."""
    channels, height, width = model.pretrained_cfg["input_size"]
    size = kwargs.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return kwargs.get("in_chans", channels), height, width
