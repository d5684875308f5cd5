"""A backbone on photos without labels: from the folder to a file, and what its embeddings are worth."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import Result, run_cli
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from lpvit_cli import load_model
from lpvit_cli.commands.reference import dense_parent, reference_of
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import model_config, save_model
from lpvit_cli.recipe import Recipe
from lpvit_cli.tasks.evaluation import validation_of
from lpvit_cli.tasks.neighbours import knn_top1

KWARGS = "{img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2, num_classes: 0}"
RECIPE = f"""
name: backbone
model:
  name: vit_tiny_patch16_224
  weights: weights.safetensors
  kwargs: {KWARGS}
  preprocess: {{crop_pct: 1.0, interpolation: bilinear}}
data: {{dataset: folder, root: photos, batch_size: 8, workers: 0}}
calibrate: {{images: 24, batch_size: 8}}
prune: {{block: [16, 8], budget: {{sparsity: 0.5}}, reweigh: 0}}
finetune: {{epochs: 1, rank: 2, lr: 1.0e-4, warmup_epochs: 0, init_batches: 1}}
bench: {{batch_sizes: [1], rounds: 6, warmup_seconds: 0, energy: {{window_seconds: 0.1}}}}
"""


def photo(path: Path, seed: int, colour: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.RandomState(seed).randint(0, 128, (4, 4, 3), dtype=np.uint8) + colour // 2
    Image.fromarray(coarse.astype(np.uint8)).resize((40, 36), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("backbone")
    for i in range(30):
        photo(place / "photos" / f"{i}.jpg", i)
    (place / "photos" / "notes.txt").write_text("no image")
    for split, count in (("train", 6), ("val", 3)):
        for label, colour in (("dark", 0), ("light", 250)):
            for i in range(count):
                photo(place / "sorted" / split / label / f"{i}.png", 10 * i + colour + len(split), colour)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **yaml.safe_load(KWARGS))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), place / "weights.safetensors")
    (place / "recipe.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def ran(place: Path) -> Result:
    result = run_cli("run", place / "recipe.yaml", "-o", place / "run", "--json")
    assert result.code == 0, result.err
    return result


def report(place: Path, stage: str) -> Any:
    return json.loads((place / "run" / stage / "report.json").read_text())


def test_what_a_run_on_unlabelled_photos_tells(place: Path, ran: Result) -> None:
    for stage, key in (("pruned", "quality"), ("finetuned", "quality_pruned")):
        quality = report(place, stage)[key]
        assert 0.5 < quality["cosine"] < 0.9999
        assert quality["cosine_p5"] <= quality["cosine"]
        assert quality["relative_error"] > 0
        assert quality["knn1"] is None
        assert report(place, stage)["quality_dense"]["cosine"] == pytest.approx(1)
        assert report(place, stage)["accuracy"] is None
    assert any("1 file is no image" in note for note in report(place, "pruned")["notes"])
    told = run_cli("run", place / "recipe.yaml", "-o", place / "run").out
    assert "embeddings at cosine 0." in told
    assert "top-1" not in told
    page = (place / "run" / "bench" / "report.html").read_text()
    assert "cosine to dense" in page
    assert "top-1" not in page


def test_the_cosine_is_that_of_the_two_models(place: Path, ran: Result) -> None:
    """Computed again from the folder's own images, outside of the tasks."""
    recipe = Recipe.load(place / "recipe.yaml")
    dense, pruned = build_model(recipe.model), load_model(place / "run" / "pruned")
    files = sorted((place / "photos").glob("*.jpg"))
    x = torch.stack([transform_for(dense)(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        cosines = torch.cosine_similarity(pruned(x), dense(x), dim=1)
    told = report(place, "pruned")["quality"]
    assert told["images"] == 6, "a fifth is held out"
    assert cosines.min() - 1e-4 <= told["cosine"] <= cosines.max() + 1e-4


def test_the_file_gives_the_embeddings_of_the_model(place: Path, ran: Result) -> None:
    import onnxruntime

    file = place / "run" / "export" / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["features"]
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(place / "run" / "finetuned")(x)
    assert np.allclose(session.run(None, {"images": x.numpy()})[0], expected.numpy(), atol=1e-4)
    parity = report(place, "export")["files"][0]["parity"]
    assert all(one["cosine"] > 0.99999 and one["agreement"] is None for one in parity)


@pytest.mark.parametrize("source", ["finetuned", "export/model.onnx"])
@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_embed(place: Path, ran: Result, tmp_path: Path, source: str, ending: str) -> None:
    """In the order of the files, with their names, an unreadable one left out; as the model gives them one by one."""
    folder = tmp_path / "images"
    for i in (3, 1, 2):
        photo(folder / f"{i}.png", i)
    (folder / "2.png").write_bytes(b"no image")
    alone, output = tmp_path / "alone.jpg", tmp_path / f"found{ending}"
    photo(alone, 9)
    result = run_cli("embed", place / "run" / source, folder, alone, "--output", output, "--batch-size", 2)
    assert result.code == 0, result.err
    assert "1 unreadable image" in result.out
    names = [str(folder / "1.png"), str(folder / "3.png"), str(alone)]
    if ending == ".npy":
        found = np.load(output)
        assert (tmp_path / "found.npy.txt").read_text().splitlines() == names
    else:
        with safe_open(output, "np") as file:
            found = file.get_tensor("embeddings")
            assert json.loads(file.metadata()["files"]) == names
    model = load_model(place / "run" / "finetuned")
    with torch.no_grad():
        expected = [model(transform_for(model)(Image.open(name).convert("RGB"))[None])[0].numpy() for name in names]
    assert np.allclose(found, expected, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_embed_writes_names_as_the_disk_has_them_and_says_what_it_left_out(place: Path, tmp_path: Path) -> None:
    section = Recipe.load(place / "recipe.yaml").model
    save_model(tmp_path / "m", model := build_model(section), model_config(section, model))
    folder = tmp_path / "images"
    photo(folder / "1.png", 1)
    shutil.copy(folder / "1.png", os.fsencode(folder) + b"/\xff.png")
    (folder / "notes.txt").write_text("no image")
    for ending in (".npy", ".safetensors"):
        result = run_cli("embed", tmp_path / "m", folder, "--output", tmp_path / f"odd{ending}")
        assert result.code == 0, result.err
        assert "1 file is no image and was left out" in " ".join(result.out.split())
    assert (tmp_path / "odd.npy.txt").read_bytes().splitlines()[1] == os.fsencode(folder) + b"/\xff.png"
    (tmp_path / "full.npy.txt").mkdir()
    run_cli("embed", tmp_path / "m", folder, "--output", tmp_path / "full.npy")
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name or path.name == "full.npy"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["predict", "run/pruned", "photos/1.jpg"], 2, "lpvit embed run/pruned photos/1.jpg --output"),
        (["embed", "run/pruned", "photos", "--output", "x.csv"], 2, "unknown ending '.csv'"),
        (["embed", "run/pruned", "photos", "--output", "no/x.npy"], 2, "there is no folder no"),
        (["embed", "run/pruned", "absent", "--output", "x.npy"], 2, "absent: no such image or folder"),
        (["evaluate", "run/pruned"], 2, "pass --reference MODEL"),
        (["evaluate", "run/pruned", "--train", "photos"], 2, "--train photos: has no classes"),
        (["evaluate", "run/pruned", "--train", "sorted"], 2, "the images have none"),
    ],
)
def test_what_cannot_be_is_said(
    place: Path, ran: Result, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, told: str
) -> None:
    monkeypatch.chdir(place)
    result = run_cli(*arguments)
    assert result.code == code, result.err
    assert told in result.err.replace("\n", " ")
    assert not list(place.glob("x*"))


def test_evaluate_beside_another_model_and_among_neighbours(place: Path, ran: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    beside = run_cli(
        "evaluate", "run/finetuned", "--root", "sorted", "--train", "sorted", "--reference", "run/pruned", "--json"
    )
    assert beside.code == 0, beside.err
    quality = json.loads(beside.out)["quality"]
    model = load_model(place / "run" / "finetuned")
    sets = []
    for split in ("train", "val"):
        files = sorted((place / "sorted" / split).rglob("*.png"))
        x = torch.stack([transform_for(model)(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            sets.append((model(x), torch.tensor([file.parent.name == "light" for file in files]).long()))
    (gallery, theirs), (queries, labels) = sets
    assert {k: quality[f"knn{k}"] for k in (1, 5, 20)} == pytest.approx(knn_top1(queries, labels, gallery, theirs))
    assert quality["images"] == 6
    assert 0.5 < quality["cosine"] <= 1


def test_the_reference_may_be_the_dense_model_or_want_other_pixels(place: Path, ran: Result, tmp_path: Path) -> None:
    told = report(place, "finetuned")["quality"]
    for source in ("run/finetuned", "run"):
        result = run_cli("evaluate", place / source, "--reference", "dense", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["quality"]["cosine"] == pytest.approx(told["cosine"], abs=1e-5)
    assert "cosine to dense" in run_cli("evaluate", place / "run" / "pruned", "--reference", "dense").out
    section = Recipe.load(place / "recipe.yaml", ["model.preprocess.mean=[0.1]"]).model
    save_model(tmp_path / "m", model := build_model(section), model_config(section, model))
    beside = run_cli("evaluate", place / "run" / "pruned", "--reference", tmp_path / "m").out
    assert f"cosine to {tmp_path / 'm'} 0." in " ".join(beside.split())
    x = torch.rand(2, 3, 32, 32)
    pruned = load_model(place / "run" / "pruned")
    means = torch.tensor(pruned.pretrained_cfg["mean"])[:, None, None]
    with torch.no_grad():
        seen = reference_of(pruned, "", str(tmp_path / "m"))((x - means) / 0.5)
        assert torch.allclose(seen, model((x - 0.1) / 0.5), atol=1e-4)


@pytest.mark.parametrize(("parent", "told"), [("/not/there", "was made of /not/there, which is not there"), (None, "not say")])
def test_a_folder_that_has_forgotten_the_dense_model(place: Path, tmp_path: Path, parent: str | None, told: str) -> None:
    section = Recipe.load(place / "recipe.yaml").model
    save_model(tmp_path / "m", model := build_model(section), model_config(section, model, parent=parent))
    with pytest.raises(UsageError, match=told):
        dense_parent(str(tmp_path / "m"))
    with pytest.raises(UsageError, match="is no model folder"):
        dense_parent(str(tmp_path / "model.onnx"))


def test_images_are_never_their_own_neighbours(place: Path, tmp_path: Path) -> None:
    """One folder for both is divided; images that lie in both are refused."""
    model = build_model(Recipe.load(place / "recipe.yaml").model)
    save_model(tmp_path / "m", model, model_config(Recipe.load(place / "recipe.yaml").model, model))
    same = place / "sorted" / "train"
    result = run_cli("evaluate", tmp_path / "m", "--root", same, "--train", same, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["quality"]["images"] == 2, "a fifth of 12"
    for options in (("--root", same, "--train", same, "--split", "all"), ("--root", same, "--train", place / "sorted")):
        result = run_cli("evaluate", tmp_path / "m", *options)
        assert result.code == 2, result.out
        assert "holds images that are evaluated (12, first:" in result.err.replace("\n", " ")


def test_classes_bring_neighbours_and_tokens_their_own_embeddings(place: Path, ran: Result) -> None:
    options = ("--set", "features=tokens", "--set", "data.root=" + str(place / "sorted"), "--set", "prune.budget.max_drop=20")
    options += ("--set", "data.exif=true")
    for command in ("calibrate", "prune"):
        result = run_cli(command, place / "recipe.yaml", "-o", place / "tokens", *options, "--json")
        assert result.code == 0, result.err
    pruned = json.loads(result.out)
    assert pruned["quality"]["cosine"] >= 0.8
    assert load_model(place / "tokens" / "pruned").pretrained_cfg["exif"] is True
    assert pruned["quality_dense"]["knn1"] is not None
    assert load_model(place / "tokens" / "pruned")(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 32)
    other = run_cli("evaluate", place / "tokens" / "pruned", "--reference", place / "run" / "pruned")
    assert other.code == 2
    assert "cannot be compared: tokens" in other.err


def test_splits_of_different_classes_bring_no_neighbours(place: Path, tmp_path: Path) -> None:
    for split, names in (("train", ("a", "b")), ("val", ("c", "d"))):
        for at, name in enumerate(names):
            photo(tmp_path / split / name / "0.png", at)
    recipe = Recipe.load(place / "recipe.yaml", [f"data.root={tmp_path}"])
    model = build_model(recipe.model)
    cpu = (torch.device("cpu"), torch.float32, lambda *told: None)
    validation = validation_of(recipe.data, recipe.calibrate, model, model, *cpu)
    assert validation.gallery is None
    assert any("no k-NN: the splits have different classes" in note for note in validation.images.notes())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("task=classification", "task: classification needs a model with a head"),
        ("finetune.target_top1=90", "finetune.target_top1"),
        ("finetune.distill=null", "recovery needs a teacher"),
        ("finetune.also_train=[head]", "this model has no head"),
    ],
)
def test_settings_that_need_classes(place: Path, ran: Result, change: str, told: str) -> None:
    command = "calibrate" if "task" in change else "finetune-lora-ga"
    result = run_cli(command, place / "recipe.yaml", "-o", place / "run", "--set", change)
    assert result.code == 2, result.err
    assert told in result.err


CLASSIFIER = ("model.weights=null", "task=classification", KWARGS.replace("num_classes: 0", "num_classes: 5"))


def classify(place: Path, command: str, *changes: str) -> Result:
    sets = (f"model.kwargs={CLASSIFIER[2]}", *CLASSIFIER[:2], "name=classifier", *changes)
    options = [word for change in sets for word in ("--set", change)]
    return run_cli(command, place / "recipe.yaml", "-o", place / "classifier", *options, "--json")


def test_a_classifier_without_labels_keeps_the_classes_of_the_dense_model(place: Path) -> None:
    refused = classify(place, "calibrate", "calibrate.gradient=empirical")
    assert refused.code == 2
    assert "empirical needs labels" in json.loads(refused.out)["error"]["message"]
    reports = {}
    for command in ("calibrate", "prune", "finetune-lora-ga"):
        result = classify(place, command)
        assert result.code == 0, result.err
        reports[command] = json.loads(result.out)
    pruned, recovered = reports["prune"], reports["finetune-lora-ga"]
    assert (pruned["quality"]["top1"], pruned["accuracy"], recovered["accuracy"]) == (None, None, None)
    assert pruned["quality_dense"]["agreement"] == 100
    assert 0 <= pruned["quality"]["agreement"] <= 100
    assert pruned["quality"]["kl"] > 0
    assert [epoch["top1"] for epoch in recovered["history"]] == [None]
    refused = classify(place, "finetune-lora-ga", "finetune.label_smoothing=0.1")
    assert refused.code == 2
    assert "these images have no labels" in json.loads(refused.out)["error"]["message"]
    alone = run_cli("evaluate", place / "classifier" / "pruned")
    assert alone.code == 2
    assert "pass --reference MODEL" in alone.err
    beside = ("evaluate", place / "classifier" / "pruned", "--reference", place / "classifier" / "pruned")
    assert json.loads(run_cli(*beside, "--json").out)["quality"]["agreement"] == 100
    others = (*beside, "--root", place / "sorted" / "val")
    assert "--labels none" in " ".join(run_cli(*others).err.split()), "two folders, five classes"
    assert json.loads(run_cli(*others, "--labels", "none", "--json").out)["quality"]["agreement"] == 100
    assert "--labels no: unknown" in run_cli(*others, "--labels", "no").err


def test_gradual_comes_near_to_the_model_that_it_began_with(place: Path) -> None:
    """Not to that of the step before, which is the dense one of a later step; its embeddings in the order of the dense ones."""
    options = ("--set", "schedule=[0.8,0.9]", "--set", f"data.root={place / 'sorted'}", "--set", "data.labels=none")
    result = run_cli("gradual", place / "recipe.yaml", "-o", place / "gradual", *options, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)["steps"][-1]
    dense, first, last = (
        build_model(Recipe.load(place / "recipe.yaml").model),
        *(load_model(place / "gradual" / "gradual" / step) for step in ("0.8", ".")),
    )
    assert torch.equal(first.norm.order, last.norm.order), "a later step keeps the order"
    files = sorted((place / "sorted" / "val").rglob("*.png"))
    x = torch.stack([transform_for(dense)(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        cosines = [float(torch.cosine_similarity(last(x), other(x), dim=1).mean()) for other in (dense, first)]
    assert cosines[0] != pytest.approx(cosines[1], abs=3e-4)
    assert told["recovered"]["quality"]["cosine"] == pytest.approx(cosines[0], abs=1e-4)
