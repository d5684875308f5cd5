"""Fused blocks against the same model unfused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import MODELS, VIT, masked, random_model, relative
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.narrow import narrow
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.recovery.lora import adapt
from lpvit_cli.sparse import densify, fuse, sparse_layers, sparsify
from lpvit_cli.sparse.fused import FusedBlock, FusedMlp

BLOCK = (8, 16)
NAME = "vit_tiny_patch16_224"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "vit with LayerScale": (NAME, {**VIT, "init_values": 0.1}),
    "vit with registers and a mean of tokens": (NAME, {**VIT, "reg_tokens": 4, "class_token": False, "global_pool": "avg"}),
    "vit with attention pooling": (NAME, {**VIT, "global_pool": "map", "init_values": 0.1}),
    "vit with all norms": (NAME, {**VIT, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "vit with a distillation token": ("deit_tiny_distilled_patch16_224", VIT),
}


def sparse(which: str, layers: Layers | None = None) -> Any:
    """One of VARIANTS, about half of the blocks of the chosen layers gone (default: all of them in transformer blocks)."""
    name, kwargs = VARIANTS[which]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs) if which not in MODELS else random_model(which)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return with_holes(model.eval(), layers)


def with_holes(model: nn.Module, layers: Layers | None = None) -> nn.Module:
    chosen = prunable_layers(model, layers or Layers())
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in chosen.items()}
    sparsify(model, {name: masked(size, BLOCK, 0.5, seed)[1] for seed, (name, size) in enumerate(sizes.items())}, BLOCK)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module) -> list[type]:
    """Of its blocks and their MLPs; the MLP of a pooling head is never sparse."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, Mlp | Block)}
    return [type(m) for name, m in modules.items() if not name.startswith("attn_pool")]


@pytest.mark.parametrize("which", VARIANTS)
def test_equal_to_the_unfused_model(which: str) -> None:
    model = sparse(which)
    fused = fuse(model)
    x = images()
    assert relative(fused(x), model(x)) < 1e-5
    assert relative(fused.double()(x.double()), model.double()(x.double())) < 1e-12
    assert not {Block, Mlp} & set(kinds(fused)), "nothing was left unfused"
    assert not {FusedBlock, FusedMlp} & set(kinds(model)), "the original stays as it was"


@pytest.mark.parametrize("which", VARIANTS)
def test_gradients_are_those_of_the_unfused_model(which: str) -> None:
    models = [sparse(which).double(), fuse(sparse(which)).double()]
    for model in models:
        model(images().double()).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in models[0].named_parameters()}
    for name, parameter in models[1].named_parameters():
        if expected[name] is not None and not name.endswith("k_norm.bias"):  # its gradient is zero but for rounding
            assert relative(parameter.grad, expected[name]) < 1e-10, name


class Count(TorchDispatchMode):
    """Operators that pass over a whole activation, and are no part of a block-sparse product."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_gelu_layer_scale_and_residual_are_no_operators_of_their_own() -> None:
    def names(model: nn.Module) -> list[str]:
        with torch.no_grad(), Count() as count:
            model.blocks(torch.randn(2, 17, 32))  # type: ignore[operator]
        return count.names

    model = sparse("vit with LayerScale")
    before, after = names(model), names(fuse(model))
    assert [before.count(name) for name in ("gelu", "mul", "add")] == [2, 4, 4]
    assert [after.count(name) for name in ("gelu", "mul", "add")] == [0, 0, 0]
    assert after.count("block_sparse_linear") == 8


@pytest.mark.parametrize("include", [["*.fc1"], ["*.fc2"], ["*.proj"], ["*.qkv"], ["blocks.1.*"]], ids=str)
def test_dense_layers_beside_sparse_ones_keep_working(include: list[str]) -> None:
    model = sparse("vit with LayerScale", Layers(include=include)).double()
    fused = fuse(model)
    assert relative(fused(images().double()), model(images().double())) < 1e-12
    assert FusedBlock in kinds(fused)
    assert (Block in kinds(fused)) == (include == ["blocks.1.*"]), "a block that is wholly dense stays timm's"


def test_narrow_blocks() -> None:
    """Two of four heads, and 40 of 128 neurons, in other blocks than whole ones."""
    model: Any = sparse("vit with LayerScale", Layers(include=["blocks.0.attn.*", "blocks.1.mlp.*"]))
    narrow(model.blocks[1].attn, torch.tensor([0, 3]))
    narrow(model.blocks[0].mlp, torch.arange(40))
    with_holes(model)
    fused: Any = fuse(model)
    assert relative(fused.double()(images().double()), model.double()(images().double())) < 1e-12
    assert kinds(fused) == [FusedBlock, FusedMlp] * 2


def test_in_training_dropout_and_drop_path_are_those_of_timm() -> None:
    rates = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.5, "init_values": 0.1}
    torch.manual_seed(0)
    model = with_holes(timm.create_model(NAME, **VIT, **rates))
    fused, x = fuse(model), images(8)
    outputs = []
    for m in (model, fused):
        torch.manual_seed(7)
        outputs.append(m.train()(x))
    assert relative(outputs[1], outputs[0]) < 1e-6
    assert relative(fused.eval()(x), model.eval()(x)) < 1e-5
    assert relative(outputs[1], fused(x)) > 0.01, "dropout that cannot be seen proves nothing"


def test_under_autocast_the_residual_stream_keeps_its_type() -> None:
    model = sparse("vit with LayerScale")
    seen = []
    for m in (model, fuse(model)):
        m.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))  # type: ignore[operator, union-attr]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen.append(m(images()))
    assert seen[0] == seen[2] == torch.float32
    assert relative(seen[3], seen[1]) < 1e-2


def test_masks_of_attention_are_heeded() -> None:
    model: Any = sparse("vit with LayerScale")
    block, fused, x = model.blocks[0], fuse(model).blocks[0], torch.randn(2, 17, 32)  # type: ignore[union-attr, index]
    mask = torch.rand(17, 17).gt(0.5).logical_or(torch.eye(17).bool())
    assert relative(fused(x, attn_mask=mask), block(x, attn_mask=mask)) < 1e-6
    assert relative(fused(x, mask), block(x, attn_mask=mask)) < 1e-6
    assert relative(fused(x, is_causal=True), block(x, is_causal=True)) < 1e-6
    assert relative(fused(x), fused(x, mask)) > 1e-3


@pytest.mark.parametrize("which", ["vit with LayerScale", "vit with all norms", "swin"])
def test_compiled_into_one_graph_and_exported(which: str) -> None:
    model = sparse(which)
    fused, x = fuse(model), images()
    with torch.no_grad():
        expected = model.double()(x.double())
        assert relative(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), expected) < 1e-5
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("images", min=2, max=64)},))
        assert relative(program.module()(images(5))[:3], fused(images(5))[:3]) < 1e-6
    assert "aten.gelu" not in str(program.graph)


def other_models() -> dict[str, nn.Module]:
    """Blocks that are near to what is fused, and are something else."""

    class OwnAttention(Attention):
        pass

    class OwnBlock(Block):
        pass

    kwargs: dict[str, dict[str, Any]] = {
        "another activation": {"act_layer": nn.ReLU},
        "GELU by tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
        "a block of one's own": {"block_fn": OwnBlock},
        "an attention of one's own": {"attn_layer": OwnAttention},
    }
    models = {name: timm.create_model(NAME, **{**VIT, **more}) for name, more in kwargs.items()}
    models["a part more in attention"] = timm.create_model(NAME, **VIT)
    for block in models["a part more in attention"].blocks:
        block.attn.gate = nn.Linear(32, 32)
    models["another LayerScale"] = timm.create_model(NAME, **VIT)
    for block in models["another LayerScale"].blocks:
        block.ls1 = nn.Sigmoid()
    return models


@pytest.mark.parametrize("which", other_models())
def test_other_blocks_are_left_alone(which: str) -> None:
    model = with_holes(other_models()[which].eval())
    fused = fuse(model)
    assert FusedBlock not in kinds(fused)
    assert (FusedMlp in kinds(fused)) == (which not in ("another activation", "GELU by tanh"))
    assert relative(fused.double()(images().double()), model.double()(images().double())) < 1e-12


@pytest.mark.parametrize(
    ("part", "expected"),
    [("attn", [Block, FusedMlp]), ("ls1", [Block, FusedMlp]), ("mlp.act", [Block, Mlp]), ("mlp.fc1", [Block, Mlp])],
)
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_parts_with_hooks_are_left_alone(register: str, part: str, expected: list[type]) -> None:
    model: Any = sparse("vit with LayerScale")
    seen: list[str] = []
    getattr(model.blocks[0].get_submodule(part), register)(lambda *_: seen.append(part))
    fused = fuse(model)
    assert kinds(fused) == [*expected, FusedBlock, FusedMlp]
    assert relative(fused(images()), model(images())) < 1e-5
    assert seen == [part] * 2


def test_a_dense_model_is_left_alone() -> None:
    model = random_model("vit")
    assert kinds(fuse(model)) == kinds(model) == [Block, Mlp] * 2


def test_a_single_block_may_be_fused() -> None:
    model: Any = sparse("vit")
    block, x = model.blocks[0], torch.randn(2, 17, 32)
    assert type(fuse(block)) is FusedBlock
    assert type(fuse(block.mlp)) is FusedMlp
    assert relative(fuse(block)(x), block(x)) < 1e-6


def test_states_and_folders_fit_both(tmp_path: Path) -> None:
    model = sparse("vit")
    fused = fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    state = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    for m in (model, fused):
        m.load_state_dict(state)
    assert relative(fused(images()), model(images())) < 1e-5
    config = {"architecture": NAME, "kwargs": VIT, "preprocessing": {"input_size": (3, 32, 32)}}
    for name, m in (("plain", model), ("fused", fused)):
        save_model(tmp_path / name, m, config)
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "fused" / "config.json").read_text()
    assert relative(load_model(tmp_path / "fused")(images()), model(images())) < 1e-5


def test_what_is_made_of_a_fused_model_computes_the_same() -> None:
    """Its layers may be replaced again: by dense ones, or by ones with adapters."""
    model = sparse("vit with LayerScale")
    fused, x = fuse(model), images()
    assert len(sparse_layers(fused)) == len(sparse_layers(model)) == 8
    assert relative(densify(fused)(x), model(x)) < 1e-5
    adapted = copy.deepcopy(fused)
    assert len(adapt(adapted, dict.fromkeys(sparse_layers(adapted), 2), alpha=4.0)) == 8
    assert relative(adapted(x), model(x)) < 1e-5
