"""Models from the hub load again without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import relative
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from small import FC1, KWARGS, VIT
from torch import nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import build_model, shrink
from lpvit_cli.models.folder import load_model, model_config, require_same_model, save_model
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.sparse import densify, sparsify

HUBS = {  # what the repository's config.json may say of a model that its name does not
    "arguments": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32], "fixed_input_size": True}}, {}),
    "arguments without a size": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 224, 224]}}, {}),
    "other preprocessing": (
        KWARGS,
        {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}},
        {},
    ),
    "another size and pooling": (
        {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "global_pool": "avg"},
        {"num_classes": 3, "pretrained_cfg": {"input_size": [3, 48, 48], "fixed_input_size": True}},
        {},
    ),
    "the recipe's own": (KWARGS, {"num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32]}}, {"num_classes": 7}),
}
FROM_HUB = "hf-hub:somebody/my-wonderful-model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], nn.Module]:
    """A hub of one repository, whose name is no architecture; None stands for one that cannot be reached."""
    repository = tmp_path / "repository"
    repository.mkdir()

    def download(repo_id: str, filename: str, **more: Any) -> str:
        if repo_id != FROM_HUB.removeprefix("hf-hub:") or not (repository / filename).is_file():
            raise EntryNotFoundError(f"{repo_id} has no {filename}")
        return str(repository / filename)

    def publish(which: str) -> nn.Module:
        arguments, content, _ = HUBS[which]
        taken = {"img_size": content["pretrained_cfg"]["input_size"][1], "num_classes": content["num_classes"], **arguments}
        torch.manual_seed(1)
        model = timm.create_model(VIT, **taken)
        save_file(model.state_dict(), repository / "model.safetensors")
        preprocessing = {"classifier": "head", **content["pretrained_cfg"]}
        written = {"architecture": VIT, "model_args": arguments, **content, "pretrained_cfg": preprocessing}
        (repository / "config.json").write_text(json.dumps(written))
        return model.eval()

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return publish


def unplug(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise OSError("the hub is not there")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)


@pytest.mark.parametrize("which", HUBS)
def test_a_model_from_the_hub_loads_again_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable[[str], nn.Module], which: str
) -> None:
    origin = hub(which)
    section = ModelSection(name=FROM_HUB, kwargs=HUBS[which][2])
    model = build_model(section)
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(2))
    expected = model(x)
    if not HUBS[which][2]:  # else its head is a new one
        assert torch.equal(expected, origin(x))
    mask = torch.rand(16, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    sparsify(model, {FC1: mask}, (16, 8))
    save_model(tmp_path / "model", model, model_config(section, model))
    require_same_model(tmp_path / "model", section)
    with pytest.raises(UsageError, match="the recipe says"):
        require_same_model(tmp_path / "model", section.model_copy(update={"kwargs": {"num_classes": 9}}))

    unplug(monkeypatch)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (VIT, model.num_classes)
    loaded = load_model(tmp_path / "model")
    assert relative(loaded(x), model(x)) < 1e-5
    assert tuple(loaded.pretrained_cfg["input_size"]) == tuple(size)
    assert list(loaded.pretrained_cfg["mean"]) == list(model.pretrained_cfg["mean"])
    again = build_model(ModelSection(name=config["architecture"], kwargs=config["kwargs"]))  # as export and gradual build it
    shapes = [{name: t.shape for name, t in one.state_dict().items()} for one in (again, densify(loaded))]
    assert shapes[0] == shapes[1]


def test_a_small_copy_of_a_model_from_the_hub(hub: Callable[[str], nn.Module]) -> None:
    """Of its architecture, with its classes; it needs no weights, so it is built without the hub."""
    hub("arguments")
    name, small = shrink(ModelSection(name=FROM_HUB))
    model = build_model(ModelSection(name=name, kwargs=small))
    assert name == VIT
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)


def test_a_small_copy_of_what_only_the_hub_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    unplug(monkeypatch)
    with pytest.raises(EnvironmentFault, match="cannot get the pretrained weights of 'hf-hub:somebody/my-wonderful-model'"):
        shrink(ModelSection(name=FROM_HUB))
