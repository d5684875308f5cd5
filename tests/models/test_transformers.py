"""Models of transformers against the library itself: outputs, folders, and what is refused.

Equal to rounding: tensors of a mapped file lie at odd addresses, where a sum may round differently.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative
from hf import CLASSES, VIT, checkpoint, images, theirs, transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small import one_line

from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.models.build import build_model, shrink
from lpvit_cli.models.folder import as_dense, load_model, model_config, require_same_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.recipe.source import apply_override


def section(folder: Path | str, **more: Any) -> ModelSection:
    return ModelSection(name=f"transformers:{folder}", **{"pretrained": True, **more})


def embedding(result: Any) -> torch.Tensor:
    """What the library calls an image's embedding, or where it does not, its first token."""
    for name in ("image_embeds", "pooler_output"):
        if result.get(name) is not None:
            return result[name]
    return result.last_hidden_state[:, 0]


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_checkpoint_gives_what_the_library_gives(tmp_path: Path, architecture: str) -> None:
    folder, x = checkpoint(tmp_path, architecture), images()
    origin = theirs(architecture)
    with torch.no_grad():
        said = origin(x)
        base = origin.base_model(x) if "ForImage" in architecture else said
    model = build_model(section(folder))
    assert model.gives == ("logits" if "ForImage" in architecture else "pooled")
    assert model.num_classes == (5 if model.gives == "logits" else 0)
    assert relative(model(x), said.logits if model.gives == "logits" else embedding(said)) < 1e-6
    pooled, tokens = (build_model(section(folder), "features", features) for features in ("pooled", "tokens"))
    assert relative(pooled(x), embedding(base)) < 1e-6
    assert relative(tokens(x), base.last_hidden_state) < 1e-6
    assert (pooled.num_classes, tokens.num_classes, tokens.gives) == (0, 0, "tokens")


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_model_comes_back_from_its_folder_without_its_checkpoint(tmp_path: Path, architecture: str) -> None:
    origin = checkpoint(tmp_path / "checkpoint", architecture)
    model, x = build_model(section(origin)), images()
    save_model(tmp_path / "model", model, model_config(section(origin), model))
    require_same_model(tmp_path / "model", section(origin))
    shutil.rmtree(origin)
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    loaded = load_model(tmp_path / "model")
    assert relative(loaded(x), model(x)) < 1e-6
    assert (loaded.gives, loaded.num_classes) == (model.gives, model.num_classes)
    assert loaded.pretrained_cfg["mean"] == list(model.pretrained_cfg["mean"])
    dense = build_model(as_dense(tmp_path / "model", tmp_path / "dense.safetensors"))  # as gradual builds it
    assert relative(dense(x), model(x)) < 1e-6


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_layers_of_its_blocks_are_pruned_by_default(tmp_path: Path, architecture: str) -> None:
    model = build_model(section(architecture, kwargs=CLASSES[architecture], pretrained=False))
    chosen = prunable_layers(model, Layers())
    each = 7 if "use_swiglu_ffn" in CLASSES[architecture] else 6
    blocks = 3 if "Swin" in architecture else 2
    inside = [name for name in chosen if any(part.isdigit() for part in name.split("."))]
    assert [name for name in inside if "downsample" not in name] == [name for name in chosen if "downsample" not in name]
    assert len([name for name in chosen if "downsample" not in name]) == each * blocks


def test_weights_from_a_file_with_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    folder, x = checkpoint(tmp_path, "ViTForImageClassification"), images()
    kwargs = CLASSES["ViTForImageClassification"]
    named = section("ViTForImageClassification", pretrained=False, kwargs=kwargs, weights=folder / "model.safetensors")
    assert relative(build_model(named)(x), theirs("ViTForImageClassification")(x).logits) < 1e-6
    tensors = load_file(folder / "model.safetensors")
    for name, complaint in ((next(iter(sorted(tensors))), "misses"), ("more", "has foreign tensors: more")):
        changed = {**tensors, name: torch.ones(1)} if name == "more" else {k: v for k, v in tensors.items() if k != name}
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(EnvironmentFault, match=f"does not fit ViTForImageClassification: {complaint}"):
            build_model(named.model_copy(update={"weights": tmp_path / "changed.safetensors"}))


def test_without_pretrained_the_weights_are_random(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "ViTModel")
    (folder / "model.safetensors").unlink()
    build_model(section(folder, pretrained=False))
    with pytest.raises(EnvironmentFault, match="no model.safetensors"):
        build_model(section(folder))


@pytest.mark.parametrize("kept", [True, False])
def test_a_pooler_that_the_checkpoint_does_not_have_is_left_out(tmp_path: Path, kept: bool) -> None:
    folder, x = checkpoint(tmp_path, "ViTModel"), images()
    if not kept:
        path = folder / "model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if "pooler" not in name}, path, {"format": "pt"})
    model = build_model(section(folder))
    result = theirs("ViTModel")(x)
    assert relative(model(x), result.pooler_output if kept else result.last_hidden_state[:, 0]) < 1e-6


def test_the_vision_tower_of_a_model_of_images_and_texts(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    x = images()
    for name in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{name}Config")(vision_config=VIT, text_config=text)
        whole = getattr(transformers, f"{name}Model")(config).eval()
        whole.save_pretrained(tmp_path / name)
        model = build_model(section(tmp_path / name))
        assert relative(model(x), whole.vision_model(x).pooler_output) < 1e-6
        assert model_config(section(tmp_path / name), model)["architecture"] == f"{name}VisionModel"


def test_another_output_by_name_or_position(tmp_path: Path) -> None:
    folder, x = checkpoint(tmp_path, "CLIPVisionModel"), images()
    result = theirs("CLIPVisionModel")(x)
    for output in ("pooler_output", 1):
        assert relative(build_model(section(folder, output=output))(x), result.pooler_output) < 1e-6
    with pytest.raises(UsageError, match="no tensor called 'nonsense'") as caught:
        build_model(section(folder, output="nonsense"))
    assert "last_hidden_state | pooler_output" in caught.value.hint
    with pytest.raises(UsageError, match=r"\[1, 17, 32\] of one image is no pooled"):
        build_model(section(folder, output="last_hidden_state"))


def test_entries_of_the_config_are_replaced(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "ViTForImageClassification")
    model: Any = build_model(section(folder, pretrained=False, kwargs={"num_hidden_layers": 1, "num_classes": 7}))
    assert len(model.model.vit.layers) == 1
    assert model(images()).shape == (3, 7)
    new_head: Any = build_model(section(folder, kwargs={"num_labels": 7}))
    assert torch.equal(new_head.model.vit.layernorm.weight, theirs("ViTForImageClassification").vit.layernorm.weight)
    with pytest.raises(UsageError, match="ViTConfig has no entry 'num_hiden_layers'") as caught:
        build_model(section(folder, kwargs={"num_hiden_layers": 1}))
    assert "num_hidden_layers" in caught.value.hint
    with pytest.raises(EnvironmentFault, match="does not fit ViTForImageClassification: has other shapes"):
        build_model(section(folder, kwargs={"intermediate_size": 96}))
    with pytest.raises(UsageError, match="transformers cannot build .*hidden_size") as caught:
        build_model(section(folder, pretrained=False, kwargs={"hidden_size": "big"}))
    one_line(caught.value)


def test_labels(tmp_path: Path) -> None:
    for name, labels in (("LABEL_1", None), ("dog", ["LABEL_0", "dog", "LABEL_2", "LABEL_3", "LABEL_4"])):
        config = {index: f"LABEL_{index}" for index in range(5)} | {1: name}
        folder = checkpoint(tmp_path / name, "ViTForImageClassification", id2label=config)
        assert build_model(section(folder)).pretrained_cfg.get("label_names") == labels


def test_a_text_model_is_refused_by_its_name(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="BertModel is no model that makes logits or embeddings of one image") as caught:
        build_model(section(tmp_path))
    one_line(caught.value)


@pytest.mark.parametrize("name", ["ViTForEverything", "PreTrainedModel", "ViTMAEModel", "Siglip2VisionModel", "os"])
def test_a_class_that_is_no_vision_model(name: str) -> None:
    with pytest.raises(UsageError, match=f"model.name: {name} is no model"):
        build_model(section(name, pretrained=False))


def test_pickles_are_refused_and_code_from_a_repository_too(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "ViTModel")
    before = build_model(section(folder))(images())
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EnvironmentFault, match="is a pickled checkpoint") as caught:
        build_model(section(folder))
    line = caught.value.hint.removeprefix('convert: python -c "').removesuffix('"')
    exec(line)
    assert relative(build_model(section(folder))(images()), before) < 1e-6, "the same command works after the conversion"
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('code of a checkpoint ran')")
    with pytest.raises((UsageError, EnvironmentFault), match="transformers") as other:
        build_model(section(folder))
    one_line(other.value)


def test_a_repository_that_is_not_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFault, match="model.name: cannot get 'transformers:somebody/nothing'") as caught:
        build_model(section("somebody/nothing"))
    one_line(caught.value)


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_small_copy(architecture: str) -> None:
    large = {"num_hidden_layers": 5, "image_size": 96}
    kwargs = {**CLASSES[architecture], **({"depths": [2, 3], "image_size": 96} if "Swin" in architecture else large)}
    name, small = shrink(section(architecture, kwargs=kwargs))
    model = build_model(ModelSection(name=name, kwargs=small))
    _, height, width = model.pretrained_cfg["input_size"]
    assert (height, width) == ((64, 64) if "Swin" in architecture else (32, 32))
    assert model(torch.randn(2, 3, height, width)).shape[0] == 2
    assert len(prunable_layers(model, Layers())) <= 15


def test_a_small_copy_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network this test refuses, and of a client that does not know that it is offline."""
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        name, small = shrink(section("google/vit-base-patch16-224", kwargs={"num_classes": 7}))
        assert name == "transformers:ViTForImageClassification"
        assert build_model(ModelSection(name=name, kwargs=small))(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
        assert offline == constants.HF_HUB_OFFLINE
    with pytest.raises(EnvironmentFault, match="cannot get"):
        shrink(section("/nowhere/at/all"))


def test_a_folder_beside_the_recipe(tmp_path: Path) -> None:
    checkpoint(tmp_path / "owner" / "name", "ViTModel")
    for given in ("owner/name", "./owner/name", str(tmp_path / "owner" / "name")):
        made = ModelSection.model_validate({"name": f"transformers:{given}"}, context={"folder": tmp_path})
        assert made.name == f"transformers:{tmp_path}/owner/name"
    assert ModelSection(name="transformers:owner/name").name == "transformers:owner/name"


def test_a_folder_typed_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "here" / "name", "ViTModel")
    monkeypatch.chdir(tmp_path / "here")
    for key in ("model.name", "finetune.distill.teacher.name"):
        for given, meant in (
            ("./name", f"{tmp_path}/here/name"),
            ("name", f"{tmp_path}/here/name"),
            ("owner/name", "owner/name"),
        ):
            content: dict[str, Any] = {}
            keys = apply_override(content, f"{key}=transformers:{given}")
            for part in keys:
                content = content[part]
            assert content == f"transformers:{meant}"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="'transformers' is not installed") as caught:
        build_model(section("ViTModel"))
    assert "lpvit[transformers]" in caught.value.hint
