"""Passes that are replayed block by block, against hooks on a whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from helpers import MODELS, VIT, random_model, relative
from torch import Tensor, nn

from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.replay import Block, Replay, blocks_of
from lpvit_cli.recipe.prune import Layers

CPU = torch.device("cpu")
OTHERS = {"eva02": "eva02_tiny_patch14_224", "dinov3": "vit_small_patch16_dinov3"}  # blocks that are given rotations by name
THEIRS = ["Dinov2Model", "DINOv3ViTModel", "SwinModel", "CLIPVisionModel"]


def model_of(which: str) -> nn.Module:
    if which in MODELS:
        return random_model(which)
    if which in THEIRS:
        hf = pytest.importorskip("models.hf")
        from lpvit_cli.models.families.transformers import TransformersModel

        return TransformersModel(hf.theirs(which), None, "pooled", 0).eval()
    torch.manual_seed(0)
    model = timm.create_model(OTHERS[which], **VIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batches() -> list[Tensor]:
    return list(torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(4))


def inputs_of(model: nn.Module, layer: str, images: list[Tensor]) -> list[Tensor]:
    """[tokens, in] of the first call, batch by batch, of whole passes."""
    seen: list[Tensor] = []
    with torch.no_grad():
        for x in images:
            calls: list[Tensor] = []
            handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, i, calls=calls: calls.append(i[0]))
            model(x)
            handle.remove()
            seen.append(calls[0].flatten(0, -2))
    return seen


def called(model: nn.Module) -> set[str]:
    """Without those that are used by their weight only."""
    seen: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, name=name: seen.add(name)) for name, m in model.named_modules()]
    with torch.no_grad():
        model(batches()[0])
    for handle in handles:
        handle.remove()
    return seen


def require_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.shape for x in got] == [x.shape for x in expected]
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))


# whole models


@pytest.mark.parametrize("which", [*MODELS, *OTHERS, *THEIRS])
def test_layers_are_given_what_whole_passes_give_them_while_those_before_them_change(which: str) -> None:
    """Weights change after every layer, as they do where pruning goes on to the next one."""
    model: Any = model_of(which)
    layers = {name: layer for name, layer in prunable_layers(model, Layers()).items() if name in called(model)}
    before = dict(model.named_modules())
    blocks = blocks_of(model, layers, batches()[0][:1])
    assert len(blocks) > 1
    assert all(block.name.rpartition(".")[2].isdigit() for block in blocks)
    assert sorted(layer for block in blocks for layer in block.layers) == sorted(layers)
    replay, moved = Replay(model, batches(), CPU, torch.float32), 0
    for block in blocks:
        replay.enter(block.name)
        for name in block.layers:
            as_it_was = inputs_of(model, name, batches())
            require_equal(list(replay.inputs(name)), as_it_was)
            require_equal(list(replay.inputs(name)), as_it_was)  # asked again
            layer = model.get_submodule(name)
            layer.weight.data = layer.weight * torch.linspace(0.5, 1.5, layer.in_features)
            moved += 1
    assert moved == len(layers)
    assert dict(model.named_modules()) == before
    assert not any("forward" in module.__dict__ for module in before.values()), "blocks do their own work again"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in before.values())


def test_blocks_of_a_vit_and_of_a_swin() -> None:
    model: Any = random_model("vit")
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = [Block(f"blocks.{n}", tuple(f"blocks.{n}.{name}" for name in names)) for n in range(2)]
    assert blocks_of(model, prunable_layers(model, Layers()), batches()[0]) == expected
    model = random_model("swin")
    places = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
    assert [block.name for block in blocks_of(model, prunable_layers(model, Layers()), batches()[0])] == places


# what is no plain row of blocks


class Linears(nn.Module):
    """Linear layers, run one after another."""

    def __init__(self, *names: str):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.relu(layer(x))
        return x


class Stem(nn.Module):
    """Layers outside of numbered modules, before and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, 8), nn.Sequential(Linears("a", "b"), Linears("a"))
        self.last = Linears("a", "b")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.embed(x)))  # type: ignore[no-any-return]


class Nested(nn.Module):
    """Numbered modules inside numbered ones; of one, a layer runs outside the inner ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Linears("a"), Linears("a")) for _ in range(2)])
        self.stages[1].add_module("reduce", nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Twice(nn.Module):
    """Calls one block twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linears("a", "b"), Linears("a")])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.blocks[1](self.blocks[0](x)))  # type: ignore[no-any-return]


class Mapping(nn.Module):
    """Its blocks give dicts, which are no tensors."""

    class Step(Linears):
        def forward(self, x: Any) -> Any:
            return {"x": super().forward(x["x"])}

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Step("a"), self.Step("a"))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks({"x": x})["x"]  # type: ignore[no-any-return]


class Inside(nn.Module):
    """Its second block runs inside the first one, behind or between the layers of that."""

    class Outer(Linears):
        def __init__(self, *names: str, first: bool):
            super().__init__(*names)
            self.first = first

        def forward(self, x: Tensor, inner: nn.Module) -> Tensor:
            return self.b(inner(self.a(x))) if self.first else inner(self.b(self.a(x)))  # type: ignore[no-any-return]

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Outer("a", "b", first=first), Linears("c")])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x, self.blocks[1])  # type: ignore[no-any-return]


class Sums(nn.Module):
    """Blocks without a residual of their own: each is given the sum of what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linears("a"), Linears("a"), Linears("a"), Linears("a")])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Ends(nn.Module):
    """Gives what its first block gave, and no block is given it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Linears("a"), Linears("a"), Linears("a")])

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return first + self.blocks[2](self.blocks[1](first))  # type: ignore[no-any-return]


ODD: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "outside": (Stem, ["embed", "blocks.0", "blocks.1", "last.a", "last.b"]),
    "nested": (Nested, ["stages.0.0", "stages.0.1", "stages.1"]),
    "twice": (Twice, [""]),
    "no tensors": (Mapping, [""]),
    "inside, between": (lambda: Inside(True), [""]),
    "inside, behind": (lambda: Inside(False), [""]),
    "sums": (Sums, [""]),
    "ends": (Ends, [f"blocks.{n}" for n in range(3)]),
}


@pytest.mark.parametrize("which", ODD)
def test_unusual_models(which: str) -> None:
    kind, expected = ODD[which]
    torch.manual_seed(1)
    model = kind().eval()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    images = list(torch.randn(7, 8, generator=torch.Generator().manual_seed(0)).split(4))
    blocks = blocks_of(model, layers, images[0])
    assert [block.name for block in blocks] == expected
    assert sorted(layer for block in blocks for layer in block.layers) == sorted(layers)
    replay = Replay(model, images, CPU, torch.float32)
    for block in blocks:
        replay.enter(block.name)
        for name in block.layers:
            require_equal(list(replay.inputs(name)), inputs_of(model, name, images))
            layer: Any = model.get_submodule(name)
            layer.weight.data = layer.weight * torch.linspace(0.5, 1.5, layer.in_features)
