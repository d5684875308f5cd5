"""Features in random orders: every family gives what it gave, in float64, and what should move has moved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import relative
from hf import CLASSES, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.models.axes import Axis, Member, axes
from lpvit_cli.models.build import build_model
from lpvit_cli.models.families.transformers import TransformersModel
from lpvit_cli.models.folder import as_dense, load_model, model_config, save_model
from lpvit_cli.models.order import Found, find_order, permute_index, prove
from lpvit_cli.models.ordered import Ordered, give_in_order, ordered_modules
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.sparse import sparsify

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 5}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "num_classes": 5}
ALL, TOLD_APART = {"neurons", "values", "queries", "residual"}, {"neurons", "values", "residual"}
TIMM: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "vit": ("vit_tiny_patch16_224", VIT, ALL),
    "vit with normalised queries": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True}, TOLD_APART),
    "vit with inner norms": ("vit_tiny_patch16_224", {**VIT, "scale_attn_norm": True, "scale_mlp_norm": True}, ALL),
    "deit, distilled": ("deit_tiny_distilled_patch16_224", VIT, ALL),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", VIT, ALL),
    "dinov2 with gates": ("vit_giant_patch14_dinov2", VIT, ALL),
    "siglip": ("vit_base_patch16_siglip_224", VIT, ALL),
    "clip": ("vit_base_patch16_clip_224", VIT, ALL),
    "beit": ("beit_base_patch16_224", VIT, ALL),
    "beitv2": ("beitv2_base_patch16_224", VIT, ALL),
    "eva": ("eva_giant_patch14_224", VIT, ALL),
    "eva02": ("eva02_tiny_patch14_224", VIT, TOLD_APART),
    "eva02 with inner norms": ("eva02_base_patch14_224", VIT, TOLD_APART),
    "dinov3": ("vit_small_patch16_dinov3", VIT, TOLD_APART),
    "dinov3 with gates": ("vit_small_plus_patch16_dinov3", VIT, TOLD_APART),
    "naflexvit": ("naflexvit_base_patch16_gap", VIT, ALL),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, ALL),
    "swin v2": ("swinv2_tiny_window8_256", SWIN, ALL),
}


def randomised(model: Any) -> Any:
    """All parameters, so that no part gives nothing; in float64, where orders round alike."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def of_timm(which: str, **more: Any) -> Any:
    name, kwargs, _ = TIMM[which]
    return randomised(timm.create_model(name, **{**kwargs, **more}))


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def shuffled(model: Any, x: Tensor | None = None) -> Found[Any]:
    generator = torch.Generator().manual_seed(3)
    found = axes(model)
    scores = {axis.name: torch.rand(axis.size, generator=generator) for axis in found}
    return find_order(model, found, scores, images() if x is None else x)


def kinds(found: Found[Any]) -> set[str]:
    return {axis.kind for axis in found.axes}


def require_moved(before: nn.Module, after: nn.Module, found: Found[Any]) -> None:
    """Every member of every axis is another tensor than it was, and nothing else is."""
    moved = {member.tensor for axis in found.axes for member in axis.members}
    theirs, ours = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (before, after))
    constant = {name for name in moved if theirs[name].unique().numel() < 2}  # zeros, or no register tokens
    changed = {name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])}
    assert changed == moved - constant
    assert ours.keys() - theirs.keys() == {f"{axis.end}.order".lstrip(".") for axis in found.axes if axis.end is not None}
    for name, tensor in theirs.items():
        assert torch.equal(tensor.flatten().sort().values, ours[name].flatten().sort().values)


@pytest.mark.parametrize("which", TIMM)
def test_families_of_timm(which: str) -> None:
    model, x = of_timm(which), images()
    found = shuffled(model)
    assert kinds(found) == TIMM[which][2]
    told = "queries and keys of this architecture stay in their order: its outputs depend on it"
    assert found.notes == [told] * (TIMM[which][2] != ALL)
    require_moved(model, found.model, found)
    with torch.no_grad():
        assert relative(found.model(x), model(x)) < 1e-11
        assert relative(found.model.forward_features(x), model.forward_features(x)) < 1e-11


@pytest.mark.parametrize("pool", ["", None], ids=["tokens", "pooled"])
@pytest.mark.parametrize("which", ["vit", "siglip", "beit", "eva02", "dinov3", "naflexvit", "swin", "swin v2"])
def test_features_come_in_the_original_order(which: str, pool: str | None) -> None:
    model, x = of_timm(which), images()
    model.reset_classifier(0, pool)
    found = shuffled(model)
    assert "residual" in kinds(found)
    with torch.no_grad():
        expected, given = model(x), found.model(x)
    assert expected.ndim == 2 + (pool == "") * (1 + which.startswith("swin"))
    assert relative(given, expected) < 1e-11
    assert relative(expected.flip(-1), expected) > 0.1, "an order that cannot be seen proves nothing"


@pytest.mark.parametrize("architecture", CLASSES)
def test_families_of_transformers(architecture: str) -> None:
    for gives in ["logits"] if "Classification" in architecture else ["pooled", "tokens"]:
        model = randomised(TransformersModel(theirs(architecture), None, gives, 5 if gives == "logits" else 0))
        found = shuffled(model)
        assert kinds(found) == (TOLD_APART if architecture == "DINOv3ViTModel" else ALL)
        require_moved(model, found.model, found)
        with torch.no_grad():
            assert relative(found.model(images()), model(images())) < 1e-11
        at_output = "CLIP" in architecture and gives == "tokens"  # they pass no norm
        assert (ordered_modules(found.model) == [""]) == at_output


def test_streams_of_swin_have_four_copies_where_patches_merge() -> None:
    first, last = (axis for axis in axes(of_timm("swin")) if axis.kind == "residual")
    held = {(member.tensor, member.dim): member.index for member in first.members}
    assert held["layers.1.downsample.reduction.weight", 1].tolist() == torch.arange(64).view(4, 16).tolist()
    assert held["layers.1.downsample.norm.weight", 0].shape == (4, 16)
    assert ("layers.1.downsample.reduction.weight", 0) in {(member.tensor, member.dim) for member in last.members}
    assert (first.end, last.end) == (None, "norm")


def test_cells_are_sorted_within_their_groups() -> None:
    member = Member("weight", 0, torch.arange(8)[None])
    axis = Axis("values", "values", torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]]), (member,))
    scores = torch.tensor([5.0, 1.0, 3.0, 4.0, 0.0, 9.0, 4.5, 4.5])
    assert permute_index(axis, scores).tolist() == [2, 3, 0, 1, 4, 5, 6, 7]  # means 3, 3.5; 4.5, 4.5: equal ones stay
    scattered = Axis("values", "values", torch.tensor([[[1], [7], [4]]]), (member,))
    assert permute_index(scattered, torch.arange(8.0)).tolist() == [0, 7, 2, 3, 1, 5, 6, 4]


def test_the_most_important_come_first() -> None:
    model = of_timm("vit")
    axis = next(axis for axis in axes(model) if axis.kind == "neurons")
    norms = model.blocks[0].mlp.fc2.weight.norm(dim=0).detach()
    moved = find_order(model, [axis], {axis.name: norms}, images()).model
    assert torch.equal(moved.blocks[0].mlp.fc2.weight.norm(dim=0), norms.sort(descending=True).values)
    assert prove(model, moved, images())
    moved.blocks[0].mlp.fc1.weight.data[[0, 1]] = moved.blocks[0].mlp.fc1.weight.data[[1, 0]]
    assert not prove(model, moved, images())


def test_an_ordered_model_is_copied_pickled_and_trained() -> None:
    model, x = of_timm("vit", num_classes=0), images()
    model.blocks[0].requires_grad_(False)
    moved = shuffled(model).model
    assert {n: p.requires_grad for n, p in moved.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert isinstance(moved.norm, Ordered)
    assert isinstance(moved.norm, type(model.norm))
    for made in (copy.deepcopy(moved), pickle.loads(pickle.dumps(moved))):
        assert type(made.norm) is type(moved.norm)
        assert torch.equal(made(x), moved(x))
    moved.half()
    assert moved.norm.order.dtype == torch.int64
    moved.double()(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in moved.parameters())


def test_a_model_reordered_twice_gathers_once() -> None:
    model, x = of_timm("swin", num_classes=0), images()
    once = shuffled(model).model
    twice = shuffled(once, x.flip(0)).model
    assert ordered_modules(twice) == ["norm"]
    assert not torch.equal(once.norm.order, twice.norm.order)
    with torch.no_grad():
        assert relative(twice(x), model(x)) < 1e-11


def test_a_gather_that_changes_nothing_is_none() -> None:
    norm = nn.LayerNorm(3)
    give_in_order(norm, torch.tensor([2, 0, 1]))
    assert norm(torch.tensor([1.0, 2.0, 3.0])).argsort().tolist() == [1, 2, 0]
    give_in_order(norm, torch.tensor([1, 2, 0]))
    assert type(norm) is nn.LayerNorm
    assert "order" not in norm.state_dict()


@pytest.mark.parametrize("features", ["pooled", "tokens"])
def test_folders(tmp_path: Path, features: Any) -> None:
    section = ModelSection(name=TIMM["swin"][0], kwargs={k: v for k, v in SWIN.items() if k != "num_classes"})
    model: Any = randomised(build_model(section, "features", features)).float()
    moved = shuffled(model).model
    sparsify(moved, {"layers.0.blocks.0.mlp.fc1": torch.ones(2, 1, dtype=torch.bool)}, (32, 16))
    save_model(tmp_path / "moved", moved, model_config(section, model))
    save_model(tmp_path / "plain", model, model_config(section, model))
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("moved", "plain")]
    assert [config.get("ordered") for config in configs] == [["norm"], None]
    loaded, x = load_model(tmp_path / "moved"), images().float()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(x), copy.deepcopy(moved)(x))
    dense = build_model(as_dense(tmp_path / "moved", tmp_path / "dense.safetensors"), "features", features)
    assert load_file(tmp_path / "dense.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(dense.norm.order, moved.norm.order), "blocks stay where they are"
    with torch.no_grad():
        assert relative(dense(x), model(x)) < 1e-5
    save_model(tmp_path / "again", dense, model_config(section, dense))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "again")(x), dense(x))


@pytest.mark.parametrize(
    "order",
    [torch.zeros(32, dtype=torch.int64), torch.arange(31), torch.arange(32.0), torch.arange(1, 33), torch.tensor(0), None],
    ids=["twice", "short", "floats", "shifted", "a number", "missing"],
)
def test_orders_that_are_none_are_damage(tmp_path: Path, order: Tensor | None) -> None:
    section = ModelSection(name=TIMM["swin"][0], kwargs=SWIN)
    model = build_model(section)
    save_model(tmp_path, shuffled(model.double()).model.float(), model_config(section, model))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]  # as of lpvit 0.2: the order itself is looked at
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["norm.order"]
    save_file({**tensors, **({} if order is None else {"norm.order": order})}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EnvironmentFault, match=r"norm\.order"):
        load_model(tmp_path)


def test_a_folder_that_gathers_where_nothing_is(tmp_path: Path) -> None:
    section = ModelSection(name=TIMM["vit"][0], kwargs=VIT)
    model = build_model(section)
    save_model(tmp_path, shuffled(model.double()).model.float(), model_config(section, model))
    config = json.loads((tmp_path / "config.json").read_text())
    for ordered in (["nothing"], [3], "norm", 5):
        (tmp_path / "config.json").write_text(json.dumps({**config, "ordered": ordered}))
        with pytest.raises(EnvironmentFault, match=r"ordered|has foreign tensors: norm\.order"):
            load_model(tmp_path)


def test_a_folder_of_a_model_that_gathers_its_output(tmp_path: Path) -> None:
    section = ModelSection(name="transformers:CLIPVisionModel", kwargs=CLASSES["CLIPVisionModel"])
    model: Any = randomised(build_model(section, "features", "tokens"))
    moved, x = shuffled(model).model.float(), images().float()
    save_model(tmp_path, moved, model_config(section, model))
    assert json.loads((tmp_path / "config.json").read_text())["ordered"] == [""]
    loaded = load_model(tmp_path)
    with torch.no_grad():
        assert relative(loaded(x), model.float()(x)) < 1e-5


def test_exported_programs(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    from lpvit_cli.export.graph import dense_graph, save_onnx

    model = of_timm("vit", num_classes=0, depth=1).float()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    moved = shuffled(model).model
    assert isinstance(moved.norm, Ordered)
    save_onnx(dense_graph(moved, 18), tmp_path / "model.onnx", {})
    session, x = ort.InferenceSession(tmp_path / "model.onnx"), images().float()
    given = session.run(None, {session.get_inputs()[0].name: x.numpy().astype(np.float32)})[0]
    with torch.no_grad():
        assert relative(torch.from_numpy(given), model(x)) < 1e-4
        assert relative(torch.export.export(moved, (x,)).module()(x), model(x)) < 1e-5


@pytest.mark.parametrize("tied", ["blocks.1.mlp.fc1.weight", "a layer", "pos_embed"])
def test_tensors_with_several_names_are_named_and_stay(tied: str) -> None:
    model = of_timm("vit")
    if tied == "a layer":
        model.blocks[1].attn.proj = model.blocks[0].attn.proj
        left = {"blocks.0.attn.values", "blocks.1.attn.values", "residual.0"}
    elif tied == "pos_embed":
        model.register_parameter("positions_too", model.pos_embed)
        left = {"residual.0"}
    else:
        model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        left = {"blocks.0.mlp.neurons", "blocks.1.mlp.neurons", "residual.0"}
    found = shuffled(model)
    assert {axis.name for axis in axes(model)} - found.orders.keys() == left
    (note,) = found.notes
    assert all(name in note for name in left)
    assert "several names" in note
    with torch.no_grad():
        assert relative(found.model(images()), model(images())) < 1e-11


class Mlp(nn.Module):
    def __init__(self, dim: int, told_apart: bool):
        super().__init__()
        self.fc1, self.fc2, self.told_apart = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim), told_apart

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).sigmoid()
        return self.fc2(x.cumsum(-1) if self.told_apart else x)


class Unknown(nn.Module):
    """Its stream, or its hidden neurons, have an order that means something."""

    def __init__(self, means: str):
        super().__init__()
        self.embed, self.means = nn.Conv2d(3, 24, 8, 8), means
        self.blocks = nn.ModuleList(Mlp(24, means == "neurons") for _ in range(2))
        self.final_norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = x + block(x.roll(1, dims=-1) if self.means == "residual" else x)
        return self.final_norm(x)


@pytest.mark.parametrize("means", ["nothing", "neurons", "residual"])
def test_unknown_architectures_move_what_is_proven(means: str) -> None:
    model = randomised(Unknown(means))
    found = shuffled(model)
    assert kinds(found) == {"neurons", "residual"} - {means}
    assert len(found.notes) == (means != "nothing")
    with torch.no_grad():
        assert relative(found.model(images()), model(images())) < 1e-11
