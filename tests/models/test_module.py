"""Models of your own code: what runs, what is refused, and that a model folder runs nothing by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative
from safetensors.torch import save_file
from small import one_line
from torch import Tensor

from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model, shrink, without_head
from lpvit_cli.models.folder import as_dense, load_model, model_config, require_same_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe import code
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, classes, form="tensor"):
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(3, width, 8, 8), nn.Linear(width, width), nn.Linear(width, classes)
        self.form = form

    def forward(self, x):
        tokens = self.hidden(self.stem(x).flatten(2).transpose(1, 2)).relu()
        logits = self.head(tokens.mean(1))
        return {"tensor": logits, "dict": {"logits": logits, "tokens": tokens}, "tuple": (logits, tokens)}[self.form]

def build(num_classes=4, width=16, form="tensor"):
    torch.manual_seed(0)
    return Net(width, num_classes, form)

def named(width):
    torch.manual_seed(0)
    return Net(width, 6)

class Told(Net):
    @property
    def num_classes(self): return 4

    def reset_classifier(self, number): self.head = nn.Identity()
    def get_classifier(self): return self.head

def rotary(seed):
    model = told()
    model.register_buffer("freqs_cis", torch.polar(torch.ones(4), torch.arange(4.0)))
    for bits in (16, 32, 64):
        model.register_buffer(f"index_{bits}", torch.arange(4).to(getattr(torch, f"uint{bits}")))
    model.register_buffer("scale", torch.ones(4).to(torch.float8_e4m3fn))
    return model

def told(): return Told(16, 4)
def leaves(): raise SystemExit("bye")
def broken(): raise KeyError("no such thing")
def text(): return "a model"
def conv(): return nn.Conv2d(3, 4, 8)
number = 3
"""
SIZE = {"input_size": (3, 32, 32)}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that only a recipe in its folder can import."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(code, "_allowed", set())
    monkeypatch.delenv(code.TRUST, raising=False)
    yield name
    sys.modules.pop(name, None)


def section(folder: Path, package: str, function: str = "build", **more: Any) -> ModelSection:
    content = {"name": f"module:{package}:{function}", "preprocess": SIZE, **more}
    return ModelSection.model_validate(content, context={"folder": folder})


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def test_a_function_beside_the_recipe(tmp_path: Path, package: str) -> None:
    one = section(tmp_path, package, kwargs={"num_classes": 5})
    model: Any = build_model(one)
    assert model(images()).shape == (3, 5)
    assert (model.num_classes, model.gives) == (5, "logits")
    assert list(prunable_layers(model, Layers())) == ["model.hidden"], "all but what gives the output"
    assert shrink(one) == (one.name, one.kwargs)
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_the_users_object_stays_as_it_is(tmp_path: Path, package: str) -> None:
    model: Any = build_model(section(tmp_path, package, "told"))
    assert (model.num_classes, model.gives, model.get_classifier()) == (4, "logits", model.model.head)
    assert not hasattr(model.model, "gives")
    bare = without_head(model)
    assert (bare(images()).shape, bare.num_classes, bare.gives) == ((3, 16), 0, "pooled")


def test_the_task_says_what_it_gives(tmp_path: Path, package: str) -> None:
    one = section(tmp_path, package, "named", kwargs={"width": 16})
    with pytest.raises(UsageError, match="does not say whether it gives logits or embeddings") as caught:
        build_model(one)
    assert "--set task=features" in caught.value.hint
    assert build_model(one, "classification").num_classes == 6
    assert build_model(one, "features").gives == "pooled"
    with pytest.raises(UsageError, match=r"\[1, 6\] of one image is no tokens"):
        build_model(one, "features", "tokens")


@pytest.mark.parametrize(("form", "logits", "tokens"), [("dict", "logits", "tokens"), ("tuple", 0, 1)])
def test_one_of_several_outputs(tmp_path: Path, package: str, form: str, logits: Any, tokens: Any) -> None:
    kwargs = {"form": form, "num_classes": 4}
    whole = build_model(section(tmp_path, package, kwargs={"num_classes": 4}))
    assert torch.equal(build_model(section(tmp_path, package, kwargs=kwargs, output=logits))(images()), whole(images()))
    embeddings = build_model(section(tmp_path, package, kwargs=kwargs, output=tokens), "features", "tokens")
    assert embeddings(images()).shape == (3, 16, 16)
    for output, complaint in ((None, f"gives no tensor but a {form}"), ("other", "no tensor called 'other'")):
        with pytest.raises(UsageError, match=complaint) as caught:
            build_model(section(tmp_path, package, kwargs=kwargs, output=output))
        assert f"{logits} | {tokens}" in caught.value.hint


@pytest.mark.parametrize(
    ("function", "more", "complaint", "hint"),
    [
        ("absent", {}, "has no function 'absent'", "spelling"),
        ("number", {}, "has no function 'number'", "spelling"),
        ("broken", {}, "raised KeyError: 'no such thing'", "correct it"),
        ("leaves", {}, "raised SystemExit: bye", "correct it"),
        ("build", {"output": "logits"}, "'logits', but the model gives one tensor", "leave it out"),
        ("build", {"output": -3, "kwargs": {"form": "tuple"}}, "no tensor called -3", "0 | 1"),
        ("build", {"output": 2, "kwargs": {"form": "dict"}}, "no tensor called 2", "logits | tokens"),
        ("text", {}, "returns a str, no torch.nn.Module", "return the model"),
        ("conv", {}, "no linear layers to prune", "another"),
        ("named", {}, r"named\(width\): missing a required argument: 'width'", "--set model.kwargs.NAME=VALUE"),
        ("build", {"kwargs": {"depth": 3}}, "unexpected keyword argument 'depth'", "--set model.kwargs"),
        ("build", {"preprocess": {}}, "cannot know the size of images", "model.preprocess.input_size"),
        ("build", {"preprocess": {"input_size": (1, 32, 32)}}, r"an image of \[1, 32, 32\] does not go through it", "size"),
        ("build", {"pretrained": True}, "nobody knows weights of your own module", "weights: FILE"),
    ],
)
def test_what_is_refused(tmp_path: Path, package: str, function: str, more: Any, complaint: str, hint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        build_model(section(tmp_path, package, function, **more))
    one_line(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "complaint"), [("nowhere.at_all:build", "cannot import nowhere.at_all"), ("os", "names no function")]
)
def test_what_cannot_be_imported(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        build_model(ModelSection(name=f"module:{name}"))
    one_line(caught.value)


def test_weights_from_a_file(tmp_path: Path, package: str) -> None:
    kwargs = {"num_classes": 4}
    tensors = {
        name: torch.zeros_like(t) for name, t in build_model(section(tmp_path, package, kwargs=kwargs)).state_dict().items()
    }
    save_file(tensors, tmp_path / "w.safetensors")
    model = build_model(section(tmp_path, package, kwargs=kwargs, weights=tmp_path / "w.safetensors"))
    assert not model(images()).any()


def test_whatever_a_module_holds_comes_back(tmp_path: Path, package: str) -> None:
    one = section(tmp_path, package, "rotary", kwargs={"seed": 20261129})
    model = build_model(one)
    save_model(tmp_path / "m", model, model_config(one, model))
    loaded = dict(load_model(tmp_path / "m").named_buffers())
    assert all(torch.equal(value.view(torch.uint8), loaded[name].view(torch.uint8)) for name, value in model.named_buffers())
    types = {torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn}
    assert {value.dtype for value in loaded.values()} == types


def test_what_would_be_refused_is_not_written(tmp_path: Path, package: str) -> None:
    one = section(tmp_path, package, kwargs={"num_classes": 4})
    model = build_model(one)
    with pytest.raises(UsageError, match=r"preprocessing: label_names|label_names: 2 names for 4 classes"):
        save_model(
            tmp_path / "m", model, {**model_config(one, model), "preprocessing": {"mean": [0.5], "label_names": ["a", "b"]}}
        )
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_a_model_folder_runs_no_code_that_nobody_allowed(
    tmp_path: Path, package: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = section(tmp_path, package, kwargs={"num_classes": 4, "form": form}, output=None if form == "tensor" else "logits")
    model, folder = build_model(one), tmp_path / "model"
    save_model(folder, model, model_config(one, model))
    assert str(tmp_path) not in (folder / "config.json").read_text()
    require_same_model(folder, one)
    assert relative(load_model(folder)(images()), model(images())) < 1e-6, "the recipe of this process names it"
    assert relative(build_model(as_dense(folder, tmp_path / "dense.safetensors"))(images()), model(images())) < 1e-6

    monkeypatch.setattr(code, "_allowed", set())
    sys.modules.pop(package)
    with pytest.raises(UsageError, match=f"made with code of yours, {package}:build") as caught:
        load_model(folder)
    assert package not in sys.modules, "refusing it did not import it"
    assert f"{code.TRUST}=1" in caught.value.hint
    one_line(caught.value)
    monkeypatch.setenv(code.TRUST, "1")
    assert load_model(folder).num_classes == 4
    monkeypatch.delenv(code.TRUST)
    assert load_model(folder, trust_code=True).num_classes == 4
