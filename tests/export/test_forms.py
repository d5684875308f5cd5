"""Every ONNX form of a block-sparse layer against float64, in onnxruntime; and whole graphs rewritten with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from helpers import masked, random_model, relative
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor, nn

from lpvit_cli.errors import CheckFailed
from lpvit_cli.export import choose
from lpvit_cli.export.choose import choose_forms, single_layer
from lpvit_cli.export.forms import FORMS, affine, forms_of
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.export.layer import ExportLayer, FormChoice
from lpvit_cli.export.rewrite import find_linears, rewrite
from lpvit_cli.measure.timing import Subject, time_in_visits
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import densify, sparse_layers, sparsify
from lpvit_cli.targets.onnxruntime import session

SHAPES = {
    "blocks divide": ((64, 48), (16, 8)),
    "ragged both ways": ((70, 50), (16, 12)),
    "one block high": ((24, 96), (24, 32)),
    "one block wide": ((96, 24), (32, 24)),
    "blocks larger than the weight": ((20, 30), (32, 64)),
}
DENSITIES = {"some kept": 0.4, "all kept": 1.0, "none kept": 0.0}


def layer_of(shape: tuple[int, int], block: tuple[int, int], density: float = 0.4, bias: bool = True) -> ExportLayer:
    weight, mask = masked(shape, block, density)
    if 0 < density < 1:
        mask[0], mask[1:2] = True, False
    made = BlockSparseMatrix.from_dense(weight, block, mask)
    return ExportLayer("layer", made, torch.randn(shape[0], generator=torch.Generator().manual_seed(2)) if bias else None)


def run(layer: ExportLayer, form: str, x: Tensor) -> Tensor:
    (y,) = session(single_layer(layer, form), 1).run(None, {"x": x.numpy()})
    return torch.from_numpy(y)


def inputs(tokens: int, features: int) -> Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_it_computes_the_layer(form: str, shape: str, density: str, bias: bool) -> None:
    layer = layer_of(*SHAPES[shape], DENSITIES[density], bias)
    for tokens in (1, 17):
        x = inputs(tokens, layer.weight.shape[1])
        expected = x.double() @ layer.weight.to_dense().double().T + (0 if layer.bias is None else layer.bias.double())
        y = run(layer, form, x)
        assert y.shape == expected.shape
        assert (y - expected).norm() <= 1e-6 * max(1.0, float(expected.norm()))


@pytest.mark.parametrize("x_range", [None, (-2.0, 3.0)], ids=["dynamic", "static"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "chain"])
def test_int8_is_the_product_of_the_rounded_numbers(form: str, shape: str, x_range: tuple[float, float] | None) -> None:
    layer = replace(layer_of(*SHAPES[shape]), int8=True, x_range=x_range)
    x = inputs(17, layer.weight.shape[1])
    low, high = x_range or (float(x.min()), float(x.max()))
    scale, zero = affine(low, high)
    rounded_x = ((x.double() / scale).round() + zero).clamp(0, 255) - zero
    weight = layer.weight.to_dense().double()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded_w = torch.where(step > 0, (weight / step).round(), 0.0)
    assert layer.bias is not None
    expected = rounded_x @ (rounded_w * step).T * scale + layer.bias.double()
    assert relative(run(layer, form, x), expected) < 2e-3, "but for halves rounded the other way in float32"
    exact = x.double() @ weight.T + layer.bias.double()
    assert 1e-3 < relative(expected, exact) < 0.2


def test_affine_is_the_range_that_onnx_finds() -> None:
    for low, high in ((-1.5, 2.5), (0.5, 3.0), (-3.0, -1.0), (0.0, 0.0)):
        scale, zero = affine(low, high)
        assert 0 <= zero <= 255
        assert (0 - zero) * scale <= min(low, 0) + scale / 2
        assert (255 - zero) * scale >= max(high, 0) - scale / 2


def test_forms_that_are_no_choice() -> None:
    layer = layer_of((64, 48), (16, 8))
    assert forms_of(layer) == ["dense", "rows", "chain", "batched"]
    assert forms_of(replace(layer, int8=True)) == ["dense", "rows", "batched"]
    assert forms_of(layer_of((64, 48), (16, 8), 1.0)) == ["dense"]


def test_rows_that_read_the_same_are_one_product() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    layer = ExportLayer("layer", BlockSparseMatrix.from_dense(torch.randn(24, 12), (8, 4), mask), None)
    graph = ir.from_proto(__import__("onnx").load_from_string(single_layer(layer, "rows"))).graph
    assert [node.op_type for node in graph].count("MatMul") == 2


# whole graphs


@pytest.fixture(scope="module", params=["vit", "vit without a qkv bias", "swin"])
def sparse_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A sparse model, and its dense graph in a file."""
    model, block = random_model(request.param), (8, 12)  # the width divides no layer
    layers = prunable_layers(model, Layers())
    sparsify(
        model,
        {name: masked(tuple(layer.weight.shape), block, 0.5, seed)[1] for seed, (name, layer) in enumerate(layers.items())},
        block,
    )
    path = tmp_path_factory.mktemp("graph") / "dense.onnx"
    save_onnx(dense_graph(densify(model), 20), path, {})
    return model, path


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_a_rewritten_model_gives_the_same_logits(
    sparse_model: tuple[nn.Module, Path], tmp_path: Path, form: str, precision: str
) -> None:
    model, path = sparse_model
    if (form, precision) == ("chain", "int8"):
        pytest.skip("there is no such form")
    layers = {
        name: ExportLayer(name, layer.weight, layer.bias, precision == "int8") for name, layer in sparse_layers(model).items()
    }
    graph = ir.load(path)
    rewrite(graph, layers, dict.fromkeys(layers, form))
    save_onnx(graph, tmp_path / "model.onnx", {})
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        (logits,) = session(tmp_path / "model.onnx", 1).run(None, {"images": x.numpy()})
        with torch.inference_mode():
            error = relative(torch.from_numpy(logits), model(x))
        assert error < (1e-5 if precision == "float32" else 0.2)
    if form != "dense":
        assert not [name for name in graph.graph.initializers if name in {f"{layer}.weight" for layer in layers}]
        assert (tmp_path / "model.onnx").stat().st_size < path.stat().st_size


def test_layers_that_are_not_in_the_graph(sparse_model: tuple[nn.Module, Path]) -> None:
    _, path = sparse_model
    with pytest.raises(CheckFailed, match="not in the ONNX graph once each: blocks.7.fc9") as caught:
        find_linears(ir.load(path), ["blocks.7.fc9"])
    assert "blocks.0" in caught.value.message, "and what is there"


# choosing


def test_the_fastest_form_is_taken_and_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def pretend(layer: ExportLayer, tokens: int, threads: int) -> FormChoice:
        timed.append(tokens)
        return FormChoice("rows", {"rows": 1.0, "dense": 2.0})

    a, b = layer_of((64, 48), (16, 8)), layer_of((64, 48), (16, 8), bias=False)
    c = layer_of((64, 48), (16, 8), 0.9)
    monkeypatch.setattr(choose, "_choose", pretend)
    chosen = choose_forms({"a": a, "b": b, "c": c}, {"a": 5, "b": 5, "c": 5}, 1, lambda *_: None)
    assert list(chosen) == ["a", "b", "c"]
    assert timed == [5, 5]
    monkeypatch.undo()
    real = choose_forms({"a": a}, {"a": 5}, 1, lambda *_: None)["a"]
    assert real.form == min(real.times_us, key=real.times_us.__getitem__)
    assert set(real.times_us) == set(FORMS)
    full = choose_forms({"a": layer_of((64, 48), (16, 8), 1.0)}, {"a": 5}, 1, lambda *_: None)["a"]
    assert (full.form, full.times_us) == ("dense", {})


def test_subjects_of_visits_are_never_alive_together() -> None:
    alive: list[str] = []
    seen: list[tuple[str, ...]] = []

    class Live:
        def __init__(self, name: str):
            self.name = name
            alive.append(name)

        def __call__(self) -> None:
            seen.append(tuple(alive))

        def __del__(self) -> None:
            alive.remove(self.name)

    def opened(name: str) -> Any:
        def open_it() -> Subject:
            return Live(name)

        return open_it

    run = time_in_visits({"a": opened("a"), "b": opened("b")}, visits=3, samples=2, threads=1)
    assert {len(together) for together in seen} == {1}
    assert {len(timing.samples_ms) for timing in run.subjects.values()} == {6}
    assert run.ratio("a", "b").low <= run.ratio("a", "b").high
    assert not alive
