"""A sample of the stress test of damaged files, and the ones that once were tracebacks, hung or took all memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import torch
from helpers import Result
from safetensors.torch import load_file, save_file

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.files import parse_json
from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.models.tensors import write_tensors

LAYER = hostile_files.LAYER


@pytest.mark.parametrize("kind", hostile_files.KINDS)
def test_a_sample_of_mutations(tmp_path: Path, kind: str) -> None:
    tally = hostile_files.try_kind(kind, tmp_path / "x", range(6 if kind in ("model.onnx", "model.pt2") else 15))
    assert not tally.broken, tally.examples


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 200 + "]" * 200, '{"a": ' * 500 + "1" + "}" * 500])
def test_nested_too_deeply(text: str) -> None:
    with pytest.raises(ValueError, match="nested more than 100 levels|Expecting"):
        parse_json(text)
    assert parse_json("[" * 50 + "]" * 50)
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(r'["\ud800"]')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole one with its checksum."""
    save_model(tmp_path / "m", hostile_files.sparse_model(), hostile_files.CONFIG)
    return tmp_path / "m"


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, **changed: Any) -> None:
    """Without the checksum."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changed.items():
        tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, {"format": "pt"})
    configure(folder, lambda config: config.pop("sha256"))


def refusal(folder: Path) -> str:
    with pytest.raises(EnvironmentFault) as caught:
        load_model(folder)
    return caught.value.message


def test_other_tensors_than_those_config_was_written_for(folder: Path) -> None:
    assert load_model(folder)
    whole = (folder / "config.json").read_text()

    def other_pattern(cols: torch.Tensor) -> torch.Tensor:
        assert cols[0] == 1, "0 is free"
        cols[0] = 0
        return cols

    change_tensors(folder, **{f"{LAYER}.cols": other_pattern})
    assert load_model(folder), "a folder of lpvit 0.2"
    (folder / "config.json").write_text(whole)
    assert "its checksum differs" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["norm.weight", f"{LAYER}.values"])
def test_weights_that_are_no_numbers(folder: Path, name: str, value: float) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    change_tensors(folder, **{name: change})
    assert f"{name} holds NaN or infinite values" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_blocks_of_another_floating_type_are_converted(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, **{f"{LAYER}.values": lambda values: values.to(dtype)})
    model = load_model(folder)
    hostile_files.predicted(model)
    assert model.get_submodule(LAYER).values.dtype == torch.float32


def test_weights_of_whole_numbers(folder: Path) -> None:
    change_tensors(folder, **{"norm.weight": lambda weight: weight.int()})
    assert "has other types: norm.weight torch.int32 for torch.float32" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kwargs": {**hostile_files.KWARGS, "depth": 3000}}, "more tensors than"),
        ({"kwargs": {**hostile_files.KWARGS, "depth": 10**9}}, "no size of an architecture"),
        ({"kwargs": {**hostile_files.KWARGS, "embed_dim": 10**5}}, "the architecture something else"),
        ({"kwargs": {**hostile_files.KWARGS, "checkpoint_path": "x.pth"}}, "checkpoint_path would fetch"),
        ({"architecture": "hf-hub:timm/vit_tiny_patch16_224"}, "asks no hub"),
        ({"num_classes": 7}, "preprocessing.label_names: 5 names for 7 classes"),
        ({"num_classes": -1}, "num_classes: Input should be greater"),
        ({"gives": "nothing"}, "gives: Input should be 'logits'"),
        ({"data": 5}, "data: Input should be an object"),
        ({"data": {"labels": "some"}}, "data.labels: Input should be 'auto'"),
        ({"preprocessing": {"mean": [0.5, float("nan"), 0.5]}}, "preprocessing.mean.1: Input should be a finite number"),
        ({"preprocessing": {"std": [0, 1, 1]}}, "preprocessing.std.0: Input should be greater than 0"),
        ({"preprocessing": {**hostile_files.PREPROCESSING, "mean": [0.5, 0.5]}}, "mean: 2 values for 3 channels"),
        ({"preprocessing": {"interpolation": "cubic"}}, "preprocessing.interpolation: Input should be 'bicubic'"),
        ({"preprocessing": {"crop_pct": 1e-9}}, "preprocessing.crop_pct"),
        ({"preprocessing": {**hostile_files.PREPROCESSING, "input_size": [3, 10**5, 10**5]}}, "are too large"),
        ({"preprocessing": {**hostile_files.PREPROCESSING, "input_size": [3, 64, 64]}}, "does not go through"),
        ({"preprocessing": {**hostile_files.PREPROCESSING, "label_names": [1, 2, 3, 4, 5]}}, "label_names.0"),
        ({"widths": [1]}, "widths: Input should be an object"),
        ({"ordered": "norm"}, "ordered: Input should be a valid array"),
    ],
    ids=str,
)
def test_configs_that_cannot_be(folder: Path, change: dict[str, Any], told: str) -> None:
    configure(folder, lambda config: config.update(change))
    assert told in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_files_without_an_end(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name}: " in refusal(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in refusal(folder)


def test_later_versions_may_say_more(folder: Path) -> None:
    configure(folder, lambda config: config.update(later={"kept": 0.5}, preprocessing={**config["preprocessing"], "x": 1}))
    assert load_model(folder)


def test_writing_a_folder_follows_no_link(folder: Path, tmp_path: Path) -> None:
    names = ("config.json", "model.safetensors")
    for name in names:
        (tmp_path / name).write_text("mine")
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / name)
    save_model(folder, hostile_files.sparse_model(), hostile_files.CONFIG)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 2
    assert not any((folder / name).is_symlink() for name in names)
    assert load_model(folder)


def test_what_is_half_written_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="contiguous"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(4, 4).T[1:, :2]})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Another user, for whom this one's folders are closed."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_folder_of_another_user(folder: Path, lpvit: Callable[..., Result], nobody: None) -> None:
    with pytest.raises(LpvitError, match="Permission denied"):
        load_model(folder)
    for command in (("predict", folder, "x.png"), ("evaluate", folder / "m.onnx"), ("merge", folder, folder, "-o", "out")):
        result = lpvit(*command)
        assert result.code == 3, result.err
        assert "Permission denied" in result.err
        assert "Traceback" not in result.err
        assert result.err.count("\n") <= 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_A.weight"), "one of the two factors of blocks.0.mlp.fc1 is missing"),
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), "one of the two factors of blocks.0.mlp.fc1 is missing"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(0, 32)}), "factors of blocks.0.mlp.fc1 do not fit"),
        (lambda t: t[f"{LAYER}.lora_B.weight"].fill_(float("nan")), "holds NaN"),
        (lambda t: t.update({"head.bias": torch.zeros(1)}), "head.bias is torch.float32 [1], the model's torch.float32 [5]"),
        (lambda t: t.update({"head.bias": torch.zeros(5).int()}), "head.bias is torch.int32"),
    ],
    ids=["no A", "no B", "no rank", "NaN", "one bias for all", "whole numbers"],
)
def test_merge_refuses_a_damaged_adapter(
    tmp_path: Path, lpvit: Callable[..., Result], change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    path = hostile_files.KINDS["adapter.safetensors"].make(tmp_path)
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, path, metadata)
    result = lpvit("merge", tmp_path / "base", path, "--output", tmp_path / "merged")
    assert result.code == 3
    assert told in result.err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", ["5", "{}", "[" * 5000, '{"stage": 1}', "\xff"])
def test_records_that_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "stage.json").write_text(content, encoding="latin-1")
    with pytest.raises(EnvironmentFault, match=r"stage\.json: unreadable: \S"):
        hostile_files.Record.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("counts", torch.tensor([0, 0]), "no numbers of tokens"),
        ("counts", torch.tensor([1.0, 1.0]), "no numbers of tokens"),
        ("counts", torch.tensor([5]), "no numbers of tokens"),
        ("input_outer", torch.zeros(12, 11), r"fc1\.input_outer is torch\.float32 \[12, 11\]"),
        ("gradient", torch.zeros(20, 12).double(), r"fc1\.gradient is torch\.float64"),
    ],
)
def test_statistics_of_no_layer(tmp_path: Path, name: str, tensor: torch.Tensor, told: str) -> None:
    kind = hostile_files.KINDS["statistics.safetensors"]
    path = kind.make(tmp_path)
    save_file(load_file(path) | {f"fc1.{name}": tensor}, path)
    with pytest.raises(EnvironmentFault, match=told):
        kind.use(path)


def test_a_parent_that_is_its_own(folder: Path) -> None:
    from lpvit_cli.commands.reference import dense_parent

    configure(folder, lambda config: config.update(parent=str(folder)))
    with pytest.raises(UsageError, match="does not say what it was made of"):
        dense_parent(str(folder))
    configure(folder, lambda config: config.update(parent={"name": 5}))
    with pytest.raises(EnvironmentFault, match="parent: name"):
        dense_parent(str(folder))
