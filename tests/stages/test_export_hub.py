"""The formats `hub` and `triton-server`, and `lpvit export --push`, on the demo's model."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from fake_hub import FakeHub, serve
from helpers import Demo, run_cli
from torch import nn

from lpvit_cli import Recipe, load_model
from lpvit_cli.export.formats.hub import copy_onnx
from lpvit_cli.export.formats.triton_server import TritonServer
from lpvit_cli.export.model_card import model_card, public_name, public_recipe
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.export.source import Publication, public_config
from lpvit_cli.measure.energy.run import Energy, EnergyRun
from lpvit_cli.report.schema import BenchReport
from lpvit_cli.stages import BENCH, PRUNE, run_of
from lpvit_cli.stages.export import publication

TOKEN = "hf_of_a_test"


@dataclasses.dataclass(frozen=True)
class Exported:
    folder: Path  # of the run
    options: list[str]
    printed: str

    @property
    def hub(self) -> Path:
        return self.folder / "export" / "hub"

    def export(self, *more: object) -> Any:
        return run_cli("export", "digits_vit", "-o", self.folder, *self.options, *more)


@pytest.fixture(scope="module")
def exported(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A copy of the demo's run, with an export of its own."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    shutil.copytree(demo.folder, folder, ignore=shutil.ignore_patterns("export", "statistics.safetensors"))
    changes = ["export.formats=[hub,triton-server]", "export.form=dense"]
    options = [*demo.options, *(option for change in changes for option in ("--set", change))]
    result = run_cli("export", "digits_vit", "-o", folder, *options)
    assert result.code == 0, result.err
    return Exported(folder, options, result.out)


def test_what_was_written(exported: Exported) -> None:
    files = sorted(str(path.relative_to(exported.folder / "export")) for path in exported.folder.glob("export/**/*.*"))
    hub = [f"hub/{name}" for name in ("README.md", "config.json", "model.onnx", "model.safetensors", "recipe.yaml")]
    triton = ["triton-server/README.md", "triton-server/digits_vit/1/model.onnx", "triton-server/digits_vit/config.pbtxt"]
    assert files == [*hub, "model.onnx", "report.json", "stage.json", *triton]
    report = json.loads((exported.folder / "export" / "report.json").read_text())
    assert [file["format"] for file in report["files"]] == ["onnx", "triton-server", "hub"]
    assert "triton-server needs the ONNX file: it was written too" in report["notes"]
    assert re.search(r"export/hub: hub, \d+\.\d MiB", exported.printed.replace("\n", ""))


@pytest.mark.parametrize("model", ["", "model.onnx"])
def test_the_folder_is_the_model(exported: Exported, model: str) -> None:
    result = run_cli("evaluate", exported.hub / model, "--json")
    assert result.code == 0, result.err
    told = json.loads((exported.folder / "finetuned" / "report.json").read_text())["accuracy"]
    assert json.loads(result.out)["accuracy"] == told
    x = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_model(exported.hub)(x), load_model(exported.folder / "finetuned")(x))


def test_the_card_tells_what_the_reports_say(exported: Exported) -> None:
    card = (exported.hub / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["library_name"], matter["pipeline_tag"]) == ("lpvit", "image-classification")
    assert {"vision-transformer", "block-sparse", "pruning"} <= set(matter["tags"])
    reports = {
        name: json.loads((exported.folder / name / "report.json").read_text())
        for name in ("pruned", "finetuned", "bench", "export")
    }
    rows = dict(re.findall(r"^\| ([^|]*) \| (\d+\.\d\d %) \| \d+\.\d\d % \| [^|]* \|$", text, re.MULTILINE))
    accuracies = {
        "dense": reports["pruned"]["accuracy_dense"],
        "pruned, one-shot": reports["pruned"]["accuracy"],
        "recovered": reports["finetuned"]["accuracy"],
        "ONNX file, float32": reports["export"]["files"][0]["accuracy"],
    }
    assert rows == {name: f"{accuracy['top1']:.2f} %" for name, accuracy in accuracies.items()}
    for batch in reports["bench"]["batches"]:
        assert f"- {batch['verdict']}\n" in text
        for reason in batch["energy_reasons"]:
            assert f"Not measured: {reason}\n" in text
    assert f"{reports['bench']['device']}, float32" in text
    file = reports["export"]["files"][0]
    assert file["speed"]["verdict"] in text
    assert [form["name"] for form in file["speed"]["free"]] == re.findall(
        r"^\| (dense \w+ in \w+)[^|]* \| [\d.]+ \|", text, re.M
    )
    assert f"| {file['bytes_dense'] / 2**20:.1f} MiB | {file['bytes'] / 2**20:.1f} MiB |" in text
    for said in ("Pruned by `obs` in blocks of 240x60", "`sparsity: 0.5`", "the `validation` split of `digits`", "rank 16"):
        assert said in text
    for said in ("lpvit run recipe.yaml", "`model.weights` is `digits_vit.safetensors`", f"torch {torch.__version__[:3]}"):
        assert said in text
    assert "\n\n\n" not in text
    assert "None" not in text


def test_nothing_tells_of_this_machine(exported: Exported) -> None:
    places = [exported.folder, Path(__file__).parents[2], Path(sys.prefix), Path(np.__file__).parents[1], Path.home()]
    for file in [
        *exported.hub.iterdir(),
        exported.folder / "export" / "model.onnx",
        *exported.folder.glob("export/*/*/1/*.onnx"),
    ]:
        content = file.read_bytes()
        for place in places:
            assert str(place).encode() + b"/" not in content, f"{file.name} names {place}"
    recipe = Recipe.load(exported.hub / "recipe.yaml")
    assert recipe.model.weights == exported.hub.resolve() / "digits_vit.safetensors", "beside the recipe, not here"
    original = Recipe.load(exported.folder / "recipe.yaml")
    assert recipe.model_copy(update={"model": original.model}) == original


def test_paths_become_names() -> None:
    paths = {"data.root": "/secret/data/imagenet", "model.weights": "/secret/w.safetensors", "prune.profile": "/secret/p.json"}
    recipe = Recipe.load("digits_vit", [f"{key}={path}" for key, path in paths.items()])
    text, names = public_recipe(recipe)
    assert "secret" not in text
    assert names == [f"`{key}` is `{Path(path).name}`" for key, path in paths.items()]
    config = {"num_classes": 5, "parent": {"weights": "/secret/w"}, "data": {"dataset": "folder", "root": "/secret/data"}}
    assert public_config(config) == {"num_classes": 5, "data": {"dataset": "folder"}}


def test_a_list_of_classes_is_no_path() -> None:
    recipe = Recipe.load("digits_vit", ["data.class_map=[ant, bee]"])
    text, names = public_recipe(recipe)
    assert yaml.safe_load(text)["data"]["class_map"] == ["ant", "bee"]
    assert "`data.class_map`" not in " ".join(names)


def test_onnx_weights_beside_the_file_come_along(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.arange(3000, dtype=np.float32), "w")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [3000]) for name in ("images", "logits")]
    node = onnx.helper.make_node("Add", ["images", "w"], ["logits"])
    node.metadata_props.add(key="stack_trace", value="/secret/code.py")
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    model.metadata_props.add(key="lpvit", value=json.dumps({"data": {"dataset": "folder"}}))
    (tmp_path / "hub").mkdir()
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    copy_onnx(tmp_path / "model.onnx", tmp_path / "hub" / "model.onnx")
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert b"secret" not in (tmp_path / "hub" / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(tmp_path / "hub" / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"images": np.zeros(3000, np.float32)})[0].tolist() == list(range(3000))
    assert json.loads(session.get_modelmeta().custom_metadata_map["lpvit"]) == {"data": {"dataset": "folder"}}


def card_of(exported: Exported, bench: BenchReport | None) -> str:
    recipe = Recipe.load(exported.folder / "recipe.yaml")
    pruned = run_of(recipe, exported.folder).report(PRUNE)
    return model_card(
        Publication(recipe, pruned, None, bench), "float32", None, "a CPU", [], ["Look."], (3, 32, 32), "logits", {"lpvit": "0"}
    )


def test_what_was_not_measured_is_called_so(exported: Exported) -> None:
    card = card_of(exported, None)
    assert "| recovered | not measured | not measured |" in card
    assert "Not recovered: nothing was trained" in card
    assert "In PyTorch: not measured." in card
    assert "In onnxruntime: not measured" in card
    assert "## Energy\n\nNot measured.\n" in card
    assert "onnxruntime.InferenceSession" not in card


def test_measured_energy_is_told(exported: Exported) -> None:
    bench = run_of(Recipe.load(exported.folder / "recipe.yaml"), exported.folder).report(BENCH)
    subjects = {name: Energy(joules, joules / 2, 50.0, [joules] * 6) for name, joules in (("dense", 0.4), ("sparse", 0.2))}
    batch = bench.batches[0].model_copy(update={"energy": EnergyRun("RAPL", 10.0, subjects), "energy_reasons": []})
    card = card_of(exported, bench.model_copy(update={"batches": [batch]}))
    assert "| sparse | 1 | 0.2 | 0.1 | 50 | 2.00 (2.00-2.00) |" in card
    assert "Not measured" not in card


def test_a_bench_of_another_model_is_not_told(exported: Exported, tmp_path: Path) -> None:
    def bench(folder: Path) -> BenchReport | None:
        recipe = Recipe.load(folder / "recipe.yaml")
        told: BenchReport | None = publication(recipe, run_of(recipe, folder)).bench
        return told

    assert bench(exported.folder) is not None
    other = tmp_path / "run"
    shutil.copytree(exported.folder, other)
    record = json.loads((other / "bench" / "stage.json").read_text())
    record["inputs"]["finetuned"] = "another"
    (other / "bench" / "stage.json").write_text(json.dumps(record))
    assert bench(other) is None
    shutil.rmtree(other / "bench")
    assert bench(other) is None


def test_export_runs_again_when_bench_did(exported: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(exported.folder, folder)
    record = json.loads((folder / "bench" / "stage.json").read_text())
    (folder / "bench" / "stage.json").write_text(json.dumps(record | {"fingerprint": "another"}))
    plan = run_cli("export", "digits_vit", "-o", folder, *exported.options, "--dry-run", "--json")
    assert json.loads(plan.out)["stages"]["export"].startswith("runs again (measured by bench")


# Triton Inference Server


def dims(config: str, what: str) -> tuple[str, str, list[int]]:
    """Name, type and dims of the input or output of a config.pbtxt."""
    found = re.search(rf"^{what} \[\s*{{\s*name: \"(\w+)\"\s*data_type: (\w+)\s*dims: \[ ([\d, ]+) \]\s*}}\s*\]", config, re.M)
    assert found, config
    return found[1], found[2], [int(size) for size in found[3].split(", ")]


def test_the_server_is_told_what_the_file_is(exported: Exported) -> None:
    folder = exported.folder / "export" / "triton-server" / "digits_vit"
    config = (folder / "config.pbtxt").read_text()
    assert config.count("{") == config.count("}")
    assert 'name: "digits_vit"\nbackend: "onnxruntime"\nmax_batch_size: 64\n' in config
    for said in ("dynamic_batching {", "preferred_batch_size: [ 8, 16, 32, 64 ]", "instance_group [", "kind: KIND_AUTO"):
        assert said in config
    graph = onnx.load(folder / "1" / "model.onnx").graph
    for what, (value,) in (("input", graph.input), ("output", graph.output)):
        tensor = value.type.tensor_type
        assert tensor.elem_type == onnx.TensorProto.FLOAT
        batch, *sizes = tensor.shape.dim
        assert batch.dim_param, "any batch"
        assert dims(config, what) == (value.name, "TYPE_FP32", [size.dim_value for size in sizes])


def test_the_servers_file_gives_the_same_logits(exported: Exported) -> None:
    x = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
    export = exported.folder / "export"
    first, second = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["logits"], {"images": x})[0]
        for path in (export / "model.onnx", export / "triton-server" / "digits_vit" / "1" / "model.onnx")
    )
    assert np.array_equal(first, second)
    readme = (export / "triton-server" / "README.md").read_text()
    assert "tritonserver --model-repository=" in readme
    assert "Resize the shorter side to 32 pixels (bilinear" in readme


def test_the_servers_model_has_a_valid_name_and_its_threads(tiny_vit: nn.Module, tmp_path: Path) -> None:
    changes = ["name=a.b", "export.precision=int8", "target.threads=3"]
    files = [ExportedFile(format="onnx", file="model.onnx", bytes=2)]
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes(name.encode())
    recipe = Recipe.load("digits_vit", changes)
    facts = {"name": recipe.name, "precision": recipe.file_precision, "asked_threads": recipe.target.threads}
    source = SimpleNamespace(**facts, file=lambda format_: files[0], model=tiny_vit)
    made = TritonServer().write(source, tmp_path, lambda *_: None)  # type: ignore[arg-type]
    assert made.file == "triton-server/a_b"
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / made.file / "1" / name).read_bytes() == name.encode()
    config = (tmp_path / made.file / "config.pbtxt").read_text()
    assert dims(config, "output") == ("logits", "TYPE_FP32", [5])
    assert "kind: KIND_CPU" in config
    assert re.search(r'parameters {\s*key: "intra_op_thread_count"\s*value: { string_value: "3" }\s*}', config)


# --push


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that the client finds, without the chunk protocol of hf_xet."""
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(fake):
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        yield fake


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_uploads_the_folder_and_nothing_else(exported: Exported, hub: FakeHub) -> None:
    hub.files = {"LICENSE": b"of the owner", "model.onnx.data": b"of an earlier push", "README.md": b"old"}
    result = exported.export("--push", "me/digits", "--json")
    assert result.code == 0, result.err
    assert "up to date, skipped" in result.err
    assert hub.files == {"LICENSE": b"of the owner", **content(exported.hub)}
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.created] == [("me", "digits", "private")]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    document = json.loads(result.out)
    assert document["pushed"] == f"{hub.endpoint}/me/digits"
    assert document["files"][-1]["format"] == "hub"


def test_push_implies_the_format(exported: Exported, hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(exported.folder, folder, ignore=shutil.ignore_patterns("export"))
    options = [*exported.options, "--set", "export.formats=[torch]"]
    result = run_cli("export", "digits_vit", "-o", folder, *options, "--push", "me/digits")
    assert result.code == 0, result.err
    assert hub.files == content(folder / "export" / "hub")
    assert set(hub.files) == {"README.md", "config.json", "model.safetensors", "recipe.yaml"}
    assert f"pushed to {hub.endpoint}/me/digits" in result.out
    plan = run_cli("export", "digits_vit", "-o", folder, *options, "--push", "me/digits", "--dry-run", "--json")
    assert json.loads(plan.out)["stages"] == {"export": "up to date", "push": "to me/digits"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_push_keeps_the_export(exported: Exported, hub: FakeHub, status: int) -> None:
    hub.refuses = status
    before = content(exported.hub)
    result = exported.export("--push", "me/digits", "--json")
    assert result.code == 3
    error = json.loads(result.out)["error"]
    assert error["message"].startswith(f"--push me/digits: refused by {hub.endpoint} ({status})")
    assert "\n" not in error["message"]
    assert "hf auth login" in error["hint"]
    assert str(exported.hub) in error["hint"]
    assert content(exported.hub) == before
    assert not hub.files


def test_a_push_without_token_or_network(exported: Exported, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hush@127.0.0.1:9")
    result = exported.export("--push", "me/digits", "--json")
    assert result.code == 3
    assert "cannot upload to http://127.0.0.1:9" in json.loads(result.out)["error"]["message"]
    assert "hush" not in result.out + result.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(exported.folder / "none"))
    result = exported.export("--push", "me/digits")
    assert result.code == 3
    assert "no Hugging Face token here" in result.err
    assert "hf auth login" in result.err
    assert not hub.created


@pytest.mark.parametrize("name", ["digits", "me/you/digits", "me/di gits", ""])
def test_push_needs_owner_and_name(exported: Exported, name: str) -> None:
    result = exported.export("--push", name)
    assert result.code == 2
    assert "not the name of a Hugging Face repository" in result.err


def test_a_rehearsal_is_not_pushed() -> None:
    result = run_cli("export", "digits_vit", "--smoke", "--push", "me/digits", "--dry-run")
    assert result.code == 2
    assert "--push: a rehearsal (--smoke) has a random model" in result.err


def test_push_is_an_option_of_export_only() -> None:
    result = run_cli("prune", "digits_vit", "--push", "me/digits")
    assert result.code == 2
    assert "--push is an option of export, not of prune" in result.err
    assert "--push" in run_cli("export", "--help").out
    assert "--push" not in run_cli("prune", "--help").out


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("transformers:/home/me/checkpoint", "transformers:./checkpoint"),
        ("transformers:OWNER/NAME", "transformers:OWNER/NAME"),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_no_path_of_this_machine_in_a_models_name(name: str, public: str) -> None:
    assert public_name(name) == public
