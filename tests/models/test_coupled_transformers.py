"""Neurons and heads of transformers: narrowed models against the whole ones in which nothing reads what was removed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative
from hf import CLASSES, checkpoint, images
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.coupled import Coupled, coupled
from lpvit_cli.models.folder import load_model, model_config, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.narrow import narrow, width
from lpvit_cli.models.trim import trim
from lpvit_cli.pruning.coupling import find_couplings
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import sparsify

HEADED = [name for name in CLASSES if name != "BeitForImageClassification"]  # whose biases of positions have all heads


def model_of(folder: Path, architecture: str) -> Any:
    return build_model(ModelSection(name=f"transformers:{checkpoint(folder, architecture)}", pretrained=True)).double()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images().double())


def modules(model: nn.Module, heads: bool) -> dict[str, Coupled]:
    found = {name: coupled(module) for name, module in model.named_modules()}
    return {name: one for name, one in found.items() if one and one.plain and one.heads == heads}


@pytest.mark.parametrize("heads", [False, True], ids=["neurons", "heads"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_what_nothing_reads_goes_without_a_trace(tmp_path: Path, architecture: str, heads: bool) -> None:
    model = model_of(tmp_path / "checkpoint", architecture)
    unread, narrowed = copy.deepcopy(model), copy.deepcopy(model)
    found = modules(model, heads)
    three = "Swin" in architecture or (architecture == "SiglipVisionModel" and not heads)  # its pooling has an MLP too
    assert len(found) == (3 if three else 2 if architecture in HEADED or not heads else 0)
    for name, one in found.items():
        keep = torch.arange(one.units)[one.units // 2 :: 1 if heads else 2]
        columns = one.columns(keep)
        consumer = unread.get_submodule(f"{name}.{one.consumer}")
        consumer.weight.data[:, [n for n in range(one.features) if n not in columns]] = 0
        narrow(narrowed.get_submodule(name), keep)
        assert width(narrowed.get_submodule(name)) == len(keep)
    assert relative(outputs(narrowed), outputs(unread)) < 1e-12
    assert not found or relative(outputs(narrowed), outputs(model)) > 1e-3, "a removal that cannot be seen proves nothing"

    section = ModelSection(name=f"transformers:{tmp_path / 'checkpoint'}", pretrained=True)
    save_model(tmp_path / "model", narrowed, model_config(section, model))
    assert relative(outputs(load_model(tmp_path / "model").double()), outputs(narrowed)) < 1e-12


@pytest.mark.parametrize("architecture", CLASSES)
def test_trimming_changes_no_output(tmp_path: Path, architecture: str) -> None:
    """The first half of every producer's rows, and some columns of every consumer, are gone."""
    model = model_of(tmp_path, architecture)
    masks = {}
    for name, one in {**modules(model, False), **modules(model, True)}.items():
        for layer in (*one.producers, one.consumer):
            linear = model.get_submodule(f"{name}.{layer}")
            mask = torch.ones(linear.out_features // 8, linear.in_features // 8, dtype=torch.bool)
            if layer == one.consumer:
                mask[:, 1] = False
            else:
                mask[: len(mask) // 2] = False
            masks[f"{name}.{layer}"] = mask
    sparsify(model, masks, (8, 8))
    trimmed = trim(model)
    assert relative(outputs(trimmed), outputs(model)) < 1e-12
    smaller = {name for name, one in modules(model, False).items() if width(trimmed.get_submodule(name)) < one.units}
    assert smaller == set(modules(model, False))


@pytest.mark.parametrize("architecture", CLASSES)
def test_patterns_find_all_layers_that_go_together(architecture: str) -> None:
    model = build_model(ModelSection(name=f"transformers:{architecture}", kwargs=CLASSES[architecture]))
    layers = prunable_layers(model, Layers())
    neurons = find_couplings(model, layers, ["neurons"], 8)
    assert {len(one.producers) for one in neurons.values()} == {2 if "use_swiglu_ffn" in CLASSES[architecture] else 1}
    if architecture not in HEADED:
        with pytest.raises(UsageError, match="no module of this model can lose heads as a whole"):
            find_couplings(model, layers, ["heads"], 8)
        return
    for one in find_couplings(model, layers, ["heads"], 8).values():
        assert [name.rpartition(".")[2] for name in one.producers] == ["q_proj", "k_proj", "v_proj"]
        assert one.width == 8
