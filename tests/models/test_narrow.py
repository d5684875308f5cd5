"""Narrower modules against the whole model in which nothing reads what was removed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODELS, random_model, relative
from timm.layers import Mlp
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.models.narrow import narrow, width
from lpvit_cli.sparse import densify, sparsify


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    """In float64, of a copy."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(images().double())


def modules(model: nn.Module, kind: type | tuple[type, ...]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def removed_heads(model: nn.Module, removed: list[int]) -> dict[str, list[int]]:
    """The heads to keep, of every attention; a negative number counts from the last head."""
    kept = {}
    for name, module in modules(model, (Attention, WindowAttention)).items():
        gone = {index % module.num_heads for index in removed}
        kept[name] = [head for head in range(module.num_heads) if head not in gone]
    return kept


def unread_heads(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """A copy of the model whose output projections have zero columns for all other heads."""
    model = copy.deepcopy(model)
    for name, heads in kept.items():
        module: Any = model.get_submodule(name)
        by_head = module.proj.weight.data.unflatten(1, (module.num_heads, -1))
        by_head[:, [head for head in range(module.num_heads) if head not in heads]] = 0
    return model


def narrowed(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, indices in kept.items():
        narrow(model.get_submodule(name), torch.tensor(indices))
    return model


@pytest.mark.parametrize("removed", [[0], [-1], [0, 2], [1, 2, -1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_heads_that_nothing_reads_go_without_a_trace(which: str, removed: list[int]) -> None:
    model = random_model(which)
    kept = removed_heads(model, removed)
    expected = logits(unread_heads(model, kept))
    got = narrowed(model, kept)
    assert relative(logits(got), expected) < 1e-12
    assert relative(logits(model), expected) > 1e-3, "a removal that cannot be seen proves nothing"
    for name, heads in kept.items():
        before, after = model.get_submodule(name), got.get_submodule(name)
        head = before.proj.in_features // before.num_heads
        assert width(after) == after.num_heads == len(heads)
        assert after.qkv.weight.shape == (3 * head * len(heads), before.qkv.in_features)
        assert after.proj.weight.shape == (before.proj.out_features, head * len(heads))


@pytest.mark.parametrize("which", ["vit", "swin"])
def test_neurons_that_nothing_reads_go_without_a_trace(which: str) -> None:
    """Every MLP loses others: the first, the last, most, all but one."""
    model = random_model(which)
    unread, kept = copy.deepcopy(model), {}
    for number, (name, module) in enumerate(modules(unread, Mlp).items()):
        hidden = module.fc1.out_features
        keep = [range(1, hidden), range(hidden - 1), range(0, hidden, 5), range(3, 4)][number % 4]
        kept[name] = list(keep)
        module.fc2.weight.data[:, [n for n in range(hidden) if n not in keep]] = 0
    got = narrowed(model, kept)
    assert relative(logits(got), logits(unread)) < 1e-12
    assert relative(logits(model), logits(unread)) > 1e-3
    for name, neurons in kept.items():
        before, after = model.get_submodule(name), got.get_submodule(name)
        assert width(after) == after.fc1.out_features == after.fc2.in_features == len(neurons)
        assert torch.equal(after.fc1.bias, before.fc1.bias[neurons]), "a bias of a neuron goes with it"
        assert torch.equal(after.fc2.bias, before.fc2.bias), "the reader's bias stays whole"


def test_what_was_cut_holds_no_memory_of_the_whole() -> None:
    """A view would keep the whole weight in memory and in a saved file."""
    model = narrowed(random_model("vit"), {"blocks.0.mlp": [5, 9], "blocks.1.attn": [2]})
    for layer in ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.attn.proj"):
        weight: Any = model.get_submodule(layer).weight
        assert weight.untyped_storage().nbytes() == weight.numel() * 4, layer


def test_modules_without_a_width() -> None:
    """Linear layers, norms, and the MLP whose layers are convolutions."""
    assert [width(nn.Linear(3, 4)), width(nn.LayerNorm(3)), width(Mlp(4, 8, use_conv=True))] == [None] * 3
    assert [width(Mlp(4, 8)), width(Attention(12, num_heads=3)), width(WindowAttention(12, 3))] == [8, 3, 3]


def test_what_a_norm_or_a_gate_separates_is_refused() -> None:
    gated = Attention(12, num_heads=3)
    gated.gate = nn.Linear(12, 12)
    normed = Attention(12, num_heads=3)
    normed.norm = nn.LayerNorm(12)
    for module in (gated, normed, Mlp(4, 8, norm_layer=nn.LayerNorm)):
        with pytest.raises(ValueError, match="a norm or a gate stands between"):
            narrow(module, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "module", [Mlp(8, 16), Attention(12, num_heads=3), WindowAttention(12, 3)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("trained", [True, False])
def test_what_was_frozen_stays_so(module: nn.Module, trained: bool) -> None:
    module = copy.deepcopy(module).requires_grad_(trained)
    if isinstance(module, Mlp):
        sparsify(module, {"fc1": torch.ones(2, 1, dtype=torch.bool)}, (8, 8))
        module.fc1.requires_grad_(trained)
    narrow(module, torch.arange(2))
    assert {parameter.requires_grad for parameter in module.parameters()} == {trained}


@pytest.mark.parametrize("module", [Mlp, lambda n, m: Attention(n, num_heads=3), lambda n, m: WindowAttention(n, 3)])
def test_indices_are_made_where_they_are_used(module: Any) -> None:
    with torch.device("meta"):
        made = module(12, 24)
    narrow(made, torch.arange(2, device="meta"))
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}


# model folders


def save(folder: Path, which: str, model: nn.Module) -> Path:
    name, kwargs = MODELS[which]
    preprocessing = {"input_size": (3, 32, 32)}
    save_model(folder, model, {"architecture": name, "kwargs": kwargs, "num_classes": 5, "preprocessing": preprocessing})
    return folder


def cut(which: str) -> nn.Module:
    """A head of each attention and two thirds of the neurons gone; the MLPs' layers stored as one block each."""
    model = random_model(which)
    model = narrowed(model, removed_heads(model, [1]))
    for name, module in modules(model, Mlp).items():
        narrow(module, torch.arange(0, module.fc1.out_features, 3))
        for layer in (f"{name}.fc1", f"{name}.fc2"):
            linear: Any = model.get_submodule(layer)
            sparsify(model, {layer: torch.ones(1, 1, dtype=torch.bool)}, tuple(linear.weight.shape))
    return model


@pytest.mark.parametrize("which", MODELS)
def test_a_narrow_model_comes_back_from_its_folder(tmp_path: Path, which: str) -> None:
    model = cut(which)
    loaded = load_model(save(tmp_path, which, model))
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    x = images()
    assert relative(loaded(x), model(x)) < 1e-6
    assert relative(densify(loaded)(x), model(x)) < 1e-5
    whole = save(tmp_path / "whole", which, random_model(which))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, whole)]
    assert sizes[0] < 0.8 * sizes[1]


def test_a_folder_from_before_widths_is_read(tmp_path: Path) -> None:
    model = random_model("vit")
    path = save(tmp_path, "vit", model) / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("widths") == {"blocks.0.attn": 4, "blocks.0.mlp": 128, "blocks.1.attn": 4, "blocks.1.mlp": 128}
    path.write_text(json.dumps(config))
    x = images()
    assert relative(load_model(tmp_path)(x), model(x)) < 1e-6


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        ({"blocks.0.attn": 2}, "blocks.0.attn"),
        ({"blocks.0.attn": 4}, "blocks.0.attn"),
        ({"blocks.0.attn": 5}, "config.json says 5 neurons or heads, the architecture has 4"),
        ({"blocks.0.attn": 0}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.attn": -1}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.attn": 2.5}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.attn": "3"}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.attn": None}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.attn": True}, r"widths\.blocks\.0\.attn: Input should be"),
        ({"blocks.0.mlp": 42}, "blocks.0.mlp"),
        ({"blocks.0.mlp": 44}, "blocks.0.mlp"),
        ({"blocks.0": 1}, "blocks.0: config.json says 1 neurons or heads, the architecture has None"),
        ({"blocks.7.attn": 1}, "no attribute `7`"),
        ({"nonsense": 1}, "nonsense"),
        (["blocks.0.attn"], "."),
        (7, "."),
    ],
    ids=str,
)
def test_widths_that_do_not_fit_are_refused(tmp_path: Path, widths: Any, told: str) -> None:
    path = save(tmp_path, "vit", cut("vit")) / "config.json"
    config = json.loads(path.read_text())
    config["widths"] = {**config["widths"], **widths} if isinstance(widths, dict) else widths
    path.write_text(json.dumps(config))
    with pytest.raises(EnvironmentFault, match=told) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message
