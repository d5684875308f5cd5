"""Adapters apart from their base: what is loaded computes what was saved, in lpvit and, where the mask allows, in peft."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import expanded, relative
from safetensors.torch import load_file
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery.lora import adapt, adapters_of, load_adapted, merge, save_adapter
from lpvit_cli.recovery.start import choose_trained
from lpvit_cli.sparse import densify, sparse_layers, sparsify

NAMES = ("blocks.0.mlp.fc1", "blocks.1.attn.qkv")
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def saved_base(model: nn.Module, folder: Path, density: float) -> Path:
    generator = torch.Generator().manual_seed(1)
    for name in NAMES:
        out, features = model.get_submodule(name).weight.shape
        sparsify(model, {name: torch.rand(out // 8, features // 16, generator=generator) < density}, (8, 16))
    config = {
        "architecture": "vit_tiny_patch16_224",
        "kwargs": KWARGS,
        "num_classes": 5,
        "preprocessing": {"input_size": [3, 32, 32]},
    }
    folder.mkdir()
    save_model(folder, model, config)
    return folder


def recovered(base: Path, seed: int, started: bool = True) -> nn.Module:
    """A model with adapters as after some training: all that trains has moved."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapt(model, {NAMES[0]: 4, NAMES[1]: 3}, alpha=8.0).values():
        a, b = (torch.randn(f.shape, generator=generator) for f in (adapter.lora_a, adapter.lora_b))
        if started:
            adapter.start(a, b)
    choose_trained(model, FinetuneSection())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("started", [True, False])
def test_a_loaded_adapter_computes_what_the_trained_model_does(tiny_vit: nn.Module, tmp_path: Path, started: bool) -> None:
    base = saved_base(tiny_vit, tmp_path / "base", 0.5)
    model = recovered(base, 0, started)
    save_adapter(tmp_path, model, base)
    ranks = {name: len(a) for name, a in load_file(tmp_path / "adapter.safetensors").items() if "lora_A" in name}
    assert sorted(ranks.values()) == ([6, 8] if started else [3, 4]), "the start that W0 absorbed is part of the file"
    x = torch.randn(3, 3, 32, 32)
    loaded = load_adapted(base, tmp_path)
    assert relative(loaded(x), model(x)) < 1e-5
    merged = copy.deepcopy(loaded)
    merge(merged)
    assert relative(merged(x), model(x)) < 1e-5
    before = sparse_layers(load_model(base))
    for name, layer in sparse_layers(merged).items():
        assert torch.equal(layer.weight.block_mask, before[name].weight.block_mask)
        mask = expanded(layer.weight.block_mask, (layer.out_features, layer.in_features), (8, 16))
        assert not layer.weight.to_dense()[~mask].any()


def test_several_adapters_over_one_base_do_not_meet(tiny_vit: nn.Module, tmp_path: Path) -> None:
    base = saved_base(tiny_vit, tmp_path / "base", 0.5)
    x, expected = torch.randn(3, 3, 32, 32), {}
    for seed in (0, 1):
        model = recovered(base, seed)
        (tmp_path / str(seed)).mkdir()
        save_adapter(tmp_path / str(seed), model, base)
        expected[seed] = model(x)
    assert relative(expected[0], expected[1]) > 0.1
    for seed in (0, 1, 0):
        assert relative(load_adapted(base, tmp_path / str(seed))(x), expected[seed]) < 1e-5


def test_peft_reads_it_and_agrees_when_every_block_is_kept(tiny_vit: nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base = saved_base(tiny_vit, tmp_path / "base", 2.0)
    model = recovered(base, 0)
    save_adapter(tmp_path, model, base)
    theirs = peft.get_peft_model(densify(load_model(base)), peft.LoraConfig.from_pretrained(tmp_path))
    result = peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter.safetensors"))
    assert not result.unexpected_keys
    x = torch.randn(3, 3, 32, 32)
    assert relative(theirs.eval()(x), model(x)) < 1e-5
    with pytest.MonkeyPatch.context() as patch:  # what peft would do without the adapter
        patch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x: self.base_layer(x))
        assert relative(theirs(x), model(x)) > 0.1


def test_an_adapter_of_another_pruned_model_is_refused(tiny_vit: nn.Module, tmp_path: Path) -> None:
    base = saved_base(tiny_vit, tmp_path / "base", 0.5)
    save_adapter(tmp_path, recovered(base, 0), base)
    other = load_model(base)
    with torch.no_grad():
        other.head.weight.add_(1)
    (tmp_path / "other").mkdir()
    save_model(tmp_path / "other", other, json.loads((base / "config.json").read_text()))
    with pytest.raises(UsageError, match="was made for another pruned model"):
        load_adapted(tmp_path / "other", tmp_path)


def test_files_that_are_no_adapters_are_refused(tiny_vit: nn.Module, tmp_path: Path) -> None:
    base = saved_base(tiny_vit, tmp_path / "base", 0.5)
    with pytest.raises(UsageError, match="no such adapter"):
        load_adapted(base, tmp_path)
    with pytest.raises(UsageError, match="not an adapter made by lpvit"):
        load_adapted(base, base / "model.safetensors")
    broken = tmp_path / "adapter.safetensors"
    broken.write_bytes(b"no tensors here")
    with pytest.raises(EnvironmentFault, match="unreadable"):
        load_adapted(base, tmp_path)


def test_it_is_small(tiny_vit: nn.Module, tmp_path: Path) -> None:
    base = saved_base(tiny_vit, tmp_path / "base", 0.5)
    model = recovered(base, 0)
    save_adapter(tmp_path, model, base)
    held: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    starts = sum(adapter.start_a.numel() + adapter.start_b.numel() for adapter in adapters_of(model).values())
    assert sum(t.numel() for t in load_file(tmp_path / "adapter.safetensors").values()) == sum(t.numel() for t in held) + starts
