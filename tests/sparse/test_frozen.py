"""Frozen models against the same models with block-sparse layers, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import MODELS, masked, random_model, relative, run_cli
from lpvit_kernels import BlockSparseMatrix, backends, dispatch, memo
from lpvit_kernels.dispatch import Case
from lpvit_kernels.tuned import Choice, Tuned
from PIL import Image
from torch import Tensor, nn

from lpvit_cli.bench.subjects import Subjects
from lpvit_cli.models.folder import save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import BlockSparseLinear, densify, freeze, fuse, sparse_layers, sparsify
from lpvit_cli.sparse.frozen import FrozenLinear
from lpvit_cli.sparse.fused import FusedBlock

CFG = {"input_size": (3, 32, 32)}
FORMS = ["gathered", "strided", "batched", "dense"]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def tuned_as(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Let tuning have found this backend the fastest for every layer."""

    def set_backend(backend: str) -> None:
        found = Tuned(Choice(backend), {backend: 1.0})
        monkeypatch.setattr(dispatch.tuned, "find", lambda key: found)
        monkeypatch.setattr(dispatch, "serves", lambda backend, case: True)
        dispatch._choice.cache_clear()

    yield set_backend
    dispatch._choice.cache_clear()


def sparse(which: str = "vit", density: float = 0.5, block: tuple[int, int] = (8, 16)) -> Any:
    """A small random model, all layers of its blocks block-sparse."""
    model = random_model(which)
    for seed, (name, layer) in enumerate(prunable_layers(model, Layers()).items()):
        size = (layer.out_features, layer.in_features)
        sparsify(model, {name: masked(size, block, density, seed)[1]}, block)
    return model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def in_double(model: nn.Module, x: Tensor) -> Tensor:
    """What the model computes without a zero left out: dense, unfused, in float64."""
    with torch.no_grad():
        output: Tensor = densify(model).double()(x.double())
    return output


class One(nn.Module):
    """A model that is one layer."""

    def __init__(self, mask: Tensor, size: tuple[int, int], block: tuple[int, int], bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layer = BlockSparseLinear.from_linear(nn.Linear(size[1], size[0], bias=bias), block, mask)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def masks(rows: int, columns: int) -> dict[str, Tensor]:
    """Patterns of kept blocks."""
    some = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < 0.5
    uneven = some.clone()
    uneven[0], uneven[1:, 2:] = True, False
    empty_rows, empty_columns, alike = some.clone(), some.clone(), some[:1].repeat(rows, 1)
    empty_rows[1::2], empty_columns[:, ::2] = False, False
    return {
        "some": some,
        "uneven rows": uneven,
        "empty rows": empty_rows,
        "empty columns": empty_columns,
        "rows alike": alike,
        "rows alike or empty": alike & (torch.arange(rows) != 1)[:, None],
        "pairs of rows alike": some[torch.arange(rows) // 2],
        "nothing kept": torch.zeros(rows, columns, dtype=torch.bool),
        "all kept": torch.ones(rows, columns, dtype=torch.bool),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", masks(5, 5))
@pytest.mark.parametrize("size", [(40, 80), (37, 70)], ids=["whole blocks", "ragged edges"])
def test_a_frozen_layer_computes_what_the_dense_one_does(
    size: tuple[int, int], pattern: str, form: str, tuned_as: Callable[[str], None]
) -> None:
    tuned_as(form)
    x = torch.randn(3, 7, size[1], dtype=torch.float64)
    for bias in (True, False):
        model = One(masks(5, 5)[pattern], size, (8, 16), bias).double()
        model.layer.values.requires_grad_(False)
        frozen = freeze(model, x)
        expected = in_double(model, x)
        torch.testing.assert_close(frozen(x), expected)
        torch.testing.assert_close(frozen(x[0]), expected[0])
        assert not isinstance(frozen.layer, BlockSparseLinear)


@pytest.mark.parametrize("form", FORMS)
def test_more_tokens_than_a_chunk(form: str, tuned_as: Callable[[str], None]) -> None:
    tuned_as(form)
    model, x = One(masks(5, 5)["some"], (37, 70), (8, 16)).double(), torch.randn(600, 70, dtype=torch.float64)
    frozen = freeze(model, x)
    for tokens in (0, 1, 256, 257, 600):
        torch.testing.assert_close(frozen(x[:tokens]), in_double(model, x[:tokens]))


@pytest.mark.parametrize("form", FORMS)
def test_padding_of_ragged_edges_is_not_read(form: str) -> None:
    weight = BlockSparseMatrix.from_dense(torch.randn(37, 70), (8, 16))
    expected, x = weight.to_dense(), torch.randn(4, 70)
    weight.values[weight.block_rows == 4, 5:] = torch.nan
    weight.values[weight.cols == 4, :, 6:] = torch.nan
    y, _ = backends.forward(x, weight, None, None, None, None, False, Choice(form))
    assert relative(y, x.double() @ expected.double().T) < 1e-5
    if product := backends.bound(Choice(form), weight):
        assert relative(product(x), x.double() @ expected.double().T) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", MODELS)
def test_a_frozen_model_and_other_batch_sizes(
    which: str, form: str, dtype: torch.dtype, tuned_as: Callable[[str], None]
) -> None:
    tuned_as(form)
    model = sparse(which).to(dtype)
    frozen = freeze(model, 2)
    assert len(sparse_layers(model)) == 8 if "vit" in which else len(sparse_layers(model)) > 8, "the original stays"
    assert not sparse_layers(frozen)
    for count in (2, 1, 5):
        x = images(count).to(dtype)
        with torch.inference_mode():
            assert relative(frozen(x), in_double(model, x)) < TOLERANCES[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_gelu_layer_scale_and_residual(form: str, tuned_as: Callable[[str], None]) -> None:
    tuned_as(form)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **{**MODELS["vit"][1], "init_values": 0.3}).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    for seed, (name, layer) in enumerate(prunable_layers(model, Layers()).items()):
        sparsify(model, {name: masked((layer.out_features, layer.in_features), (8, 16), 0.5, seed)[1]}, (8, 16))
    frozen = freeze(model, 3)
    assert all(type(block) is FusedBlock for block in frozen.blocks)  # type: ignore[union-attr]
    assert relative(frozen(images(3)), in_double(model, images(3))) < 1e-5
    assert relative(freeze(frozen, 3)(images(3)), in_double(model, images(3))) < 1e-5, "frozen again it is the same"


@pytest.mark.parametrize("form", ["batched", "dense"])
def test_under_autocast_weights_are_in_its_type(form: str, tuned_as: Callable[[str], None]) -> None:
    tuned_as(form)
    model = sparse()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        frozen: Any = freeze(model, 2)
        fc1 = frozen.blocks[0].mlp.fc1
        assert {tensor.dtype for tensor in fc1.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
        assert frozen.blocks[0].norm1.weight.dtype == torch.float32
        assert frozen.blocks(torch.randn(2, 17, 32)).dtype == torch.float32, "the residual stream keeps its type"
        assert relative(frozen(images(2)), in_double(model, images(2))) < 2e-2


def test_layers_that_run_dense_are_plain_ones_with_one_copy_of_their_weights() -> None:
    model = sparse(density=0.9)  # dense by rule of thumb
    frozen = freeze(model, 64)
    layers = {name: frozen.get_submodule(name) for name in sparse_layers(model)}
    plain = {name: layer for name, layer in layers.items() if type(layer) is nn.Linear}
    assert len(plain) >= 6, "but for those with empty columns"
    for name, layer in plain.items():
        assert {key: tensor.shape for key, tensor in layer.state_dict().items()} == {
            "weight": (layer.out_features, layer.in_features),
            "bias": (layer.out_features,),
        }, name
    dense = sum(tensor.nbytes for tensor in random_model("vit").state_dict().values())
    assert sum(tensor.nbytes for tensor in frozen.state_dict().values()) <= dense


@pytest.mark.parametrize("form", ["gathered", "batched"])
def test_sparse_layers_hold_their_kept_blocks_once(form: str, tuned_as: Callable[[str], None]) -> None:
    tuned_as(form)
    model = One(masks(4, 5)["pairs of rows alike"], (32, 80), (8, 16))
    frozen = freeze(model, torch.randn(4, 80))
    numbers = sum(tensor.numel() for tensor in frozen.state_dict().values() if tensor.is_floating_point())
    extra = 1.25 if form == "batched" else 1.0
    assert numbers <= extra * model.layer.values.numel() + 32
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_call_looks_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse()
    frozen, x = freeze(model, 2), images(2)
    asked: list[str] = []

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (asked.append(name), original(*args, **kwargs))[1])

    count(dispatch, "choose")
    count(dispatch, "case")
    count(dispatch.tuned, "find")
    count(memo._MEMO, "setdefault")
    with torch.inference_mode():
        model(x)
        assert {"choose", "case", "setdefault"} <= set(asked), "what is counted is what block-sparse layers do"
        asked.clear()
        frozen(x)
        frozen(images(5))
    assert asked == []


def test_each_batch_size_has_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_rule(case: Case, sparse_only: bool = False) -> Choice:
        return Choice("dense" if case.tokens > 100 else "gathered")

    monkeypatch.setattr(dispatch, "by_rule", by_rule)
    dispatch._choice.cache_clear()
    model = sparse(density=0.9)
    kinds = [[type(freeze(model, batch).get_submodule(name)) for name in sparse_layers(model)] for batch in (1, images(16))]
    dispatch._choice.cache_clear()
    assert set(kinds[0]) == {FrozenLinear}
    assert nn.Linear in kinds[1]


def test_a_layer_with_two_names_stays_one_layer(tuned_as: Callable[[str], None]) -> None:
    tuned_as("gathered")
    model: Any = nn.Sequential(One(masks(5, 5)["some"], (80, 80), (16, 16)), nn.Identity())
    model.append(model[0])
    frozen: Any = freeze(model, torch.randn(4, 80))
    assert frozen[0].layer is frozen[2].layer
    assert isinstance(frozen[0].layer, FrozenLinear)
    x = torch.randn(4, 80)
    assert relative(frozen(x), in_double(model, x)) < 1e-5


def test_a_dense_model_is_given_back() -> None:
    model = random_model("vit")
    assert freeze(model, 2) is model


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that freezing binds, one for each layer."""
    found: list[str] = []
    original = backends.bound
    monkeypatch.setattr(backends, "bound", lambda choice, weight: (found.append(choice.backend), original(choice, weight))[1])
    return found


@pytest.mark.parametrize("command", ["predict", "embed", "evaluate"])
def test_commands_run_the_frozen_model(command: str, bound: list[str], tmp_path: Path) -> None:
    model = sparse()
    save_model(tmp_path / "model", model, {"architecture": MODELS["vit"][0], "kwargs": MODELS["vit"][1], "preprocessing": CFG})
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (40 * number, 200, 90)).save(tmp_path / "images" / f"{number}.png")
    given: dict[str, list[object]] = {
        "predict": [tmp_path / "images" / "0.png"],
        "embed": [tmp_path / "images", "--output", tmp_path / "out.npy", "--batch-size", 2],
        "evaluate": [
            "--root",
            tmp_path / "images",
            "--dataset",
            "folder",
            "--reference",
            tmp_path / "model",
            "--batch-size",
            2,
        ],
    }
    result = run_cli(command, tmp_path / "model", *given[command], "--device", "cpu")
    assert result.code == 0, result.err
    assert len(bound) == 8


def test_bench_times_the_frozen_model_and_counts_its_memory() -> None:
    made = object.__new__(Subjects)
    made.device, made.dtype, made.asked, made.files = torch.device("cpu"), torch.float32, ("sparse",), {}
    made.models = {"sparse": fuse(sparse(density=0.9))}
    frozen = made._called("sparse", images(64))
    assert frozen is not None
    assert not sparse_layers(frozen)
    assert made._called("sparse-compiled", images(64)) is made.models["sparse"]
    stored = sum(tensor.nbytes for tensor in frozen.state_dict().values())
    assert (made.prepare(images(64)).memory_bytes["sparse"] or stored) >= stored
