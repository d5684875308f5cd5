"""Files that are damaged or meant badly: one whole specimen of every kind, its mutations, and what must hold for each."""

from __future__ import annotations

import json
import random
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from helpers import VIT as KWARGS
from helpers import masked, random_model, random_statistics
from hostile import BYTES, LONGEST, Tally, try_one
from mutations import as_archive, as_json, as_lines, as_onnx, as_tensors
from PIL import Image
from report.made import bench
from torch import nn

from lpvit_cli.commands.compare import read_report
from lpvit_cli.curvature import load_statistics, save_statistics
from lpvit_cli.data.classes import read_class_map
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import LpvitError
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.export.program import export_program, plain
from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.profile import DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.pipeline.record import Record
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery import checkpoint
from lpvit_cli.recovery.history import History
from lpvit_cli.recovery.lora import adapt, load_adapted, merge, save_adapter
from lpvit_cli.recovery.start import choose_trained
from lpvit_cli.sparse import sparsify
from lpvit_cli.targets.onnxruntime import OnnxModel
from lpvit_cli.targets.pt2 import EXTRA_FILE, TorchProgram

LAYER, FC = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"
PREPROCESSING = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
CONFIG: dict[str, Any] = {
    "family": "timm",
    "architecture": "vit_tiny_patch16_224",
    "kwargs": KWARGS,
    "num_classes": 5,
    "gives": "logits",
    "preprocessing": {**PREPROCESSING, "label_names": list("abcde")},
    "data": {"dataset": "digits", "root": "", "split": "test", "labels": "auto", "exif": False},
    "parent": {"name": "vit_tiny_patch16_224", "kwargs": KWARGS},
}


@dataclass(frozen=True)
class Kind:
    """`make` writes a whole one into a folder and says which file is mutated; `use` reads it as lpvit does."""

    make: Callable[[Path], Path]
    use: Callable[[Path], object]
    mutate: Callable[[bytes, random.Random], bytes]


def try_kind(name: str, folder: Path, seeds: range) -> Tally:
    """Mutations of a kind's specimen, one for each seed."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    kind, tally = KINDS[name], Tally()
    folder.mkdir(parents=True)
    path = kind.make(folder)
    whole = path.read_bytes()
    kind.use(path)  # also imports all there is, before memory is looked at
    for seed in seeds:
        path.write_bytes(kind.mutate(whole, random.Random(seed)))
        try_one(tally, f"{name} {seed}", partial(kind.use, path), wrong_with)
    shutil.rmtree(folder)
    return tally


def limit_memory() -> None:
    """Of this process, so that what takes all of it does not take the machine."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def wrong_with(error: LpvitError) -> list[str]:
    lines = f"{error.message}\n{error.hint}" if error.hint else error.message
    return ["told at length"] * (lines.count("\n") > 2 or len(error.message) > LONGEST)


# specimens, and what lpvit does with them


def sparse_model() -> Any:
    model = random_model("vit")
    for name in (LAYER, FC):
        sparsify(model, {name: masked(model.get_submodule(name).weight.shape, (8, 16), 0.5)[1]}, (8, 16))
    return model


def a_folder(folder: Path) -> Path:
    """Without a checksum, so that what else is wrong has to be seen."""
    save_model(folder, sparse_model(), CONFIG)
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    config["tokens"] = {"fraction": 0.2, "after": [0], "prefix": 1, "restores": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def predicted(model: Any) -> None:
    """As predict does."""
    image = transform_for(model)(Image.new("RGB", (40, 30)))[None]
    names = model.pretrained_cfg.get("label_names")
    with torch.inference_mode():
        best = model(image)[0].float().softmax(dim=0).topk(1).indices.tolist()
    assert names is None or names[best[0]] is not None


def _adapter(folder: Path) -> Path:
    base = a_folder(folder / "base")
    model = load_model(base)
    for adapter in adapt(model, {LAYER: 2, FC: 3}, alpha=8.0).values():
        adapter.start(torch.randn_like(adapter.lora_a), torch.randn_like(adapter.lora_b))
    choose_trained(model, FinetuneSection())
    save_adapter(folder, model, base)
    return folder / "adapter.safetensors"


def _merged(path: Path) -> None:
    model = load_adapted(path.parent / "base", path)
    merge(model)
    predicted(model)


def _layers() -> dict[str, nn.Linear]:
    return {"fc1": nn.Linear(12, 20), "fc2": nn.Linear(20, 12)}


def _statistics(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "statistics.safetensors"
    save_statistics(path, {"fc1": random_statistics(20, 12), "fc2": random_statistics(12, 20)}, _layers())
    return path


def _hessians(path: Path) -> None:
    torch.manual_seed(0)
    for statistics in load_statistics(path, _layers()).values():
        assert statistics.token_hessian.shape == statistics.hessian.shape
        assert statistics.loss_weights.isfinite().all()


def _profile(folder: Path) -> Path:
    sparse = SparseProfile(block=(32, 16), kept=[0.1, 0.5, 1.0], ms=[1.0, 2.0, 4.0], mj=[10.0, 20.0, 40.0])
    layer = LayerProfile(shape=(96, 48), rows=17, bias=True, names=["fc1"], dense_ms=3.0, dense_mj=30.0, sparse=[sparse])
    DeviceProfile(
        device="a CPU",
        dtype="float32",
        threads=2,
        model="vit",
        batch_size=1,
        provenance={"date": "today"},
        model_ms=20.0,
        model_mj=700.0,
        model_work=Work(macs=10**9, moved_bytes=10**6),
        energy_source="RAPL",
        energy_reasons=[],
        layers=[layer],
    ).save(folder / "profile.json")
    return folder / "profile.json"


def _times(path: Path) -> None:
    profile = DeviceProfile.load(path)
    assert profile.rest_ms >= 0
    assert profile.rest_mj is None or profile.rest_mj >= 0
    kept = torch.tensor([0.2, 1.0])
    assert profile.linear_ms((96, 48), 17, (32, 16), kept).shape == profile.linear_mj((96, 48), 17, (32, 16), kept).shape


def _record(folder: Path) -> Path:
    facts = {"created": "2026-01-01", "duration_s": 1.5, "command": "lpvit prune", "git_commit": None, "device": "cpu"}
    Record(stage="prune", fingerprint="abc", reads=["a.b"], inputs={"a.b": 1}, **facts).save(folder)  # type: ignore[arg-type]
    return folder / "stage.json"


def _recorded(path: Path) -> None:
    record = Record.load(path.parent)
    if record:
        sorted(record.inputs), [key.split(".") for key in record.reads], record.fingerprint.strip()


def _report(folder: Path) -> Path:
    (folder / "report.json").write_text(bench().model_dump_json())
    return folder / "report.json"


def _checkpoint(folder: Path) -> Path:
    tensors = {"model": {"a": torch.ones(4, 3)}, "optimizer": {"0.step": torch.tensor(3.0)}}
    checkpoint.write(folder / "last.safetensors", tensors, {"step": 3, "best": [0.5, 1]})
    return folder / "last.safetensors"


def _history(folder: Path) -> Path:
    entries = [{"step": 1, "loss": 0.5}, {"epoch": 1, "loss": 0.4}, {"step": 2, "loss": 0.3}]
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder / "history.jsonl"


def _classes(folder: Path) -> Path:
    (folder / "classes.json").write_text(json.dumps({"cat": 0, "dog": 1, "eel": 2}))
    return folder / "classes.json"


def _onnx(folder: Path) -> Path:
    save_onnx(dense_graph(random_model("vit"), 20), folder / "model.onnx", CONFIG)
    return folder / "model.onnx"


def _pt2(folder: Path) -> Path:
    program = export_program(plain(random_model("vit"), {}, {}))
    torch.export.save(program, folder / "model.pt2", extra_files={EXTRA_FILE: json.dumps(CONFIG)})
    return folder / "model.pt2"


KINDS = {
    "config.json": Kind(lambda f: a_folder(f) / "config.json", lambda p: predicted(load_model(p.parent)), as_json),
    "model.safetensors": Kind(
        lambda f: a_folder(f) / "model.safetensors", lambda p: predicted(load_model(p.parent)), as_tensors
    ),
    "adapter.safetensors": Kind(_adapter, _merged, as_tensors),
    "statistics.safetensors": Kind(_statistics, _hessians, as_tensors),
    "checkpoint": Kind(_checkpoint, checkpoint.read, as_tensors),
    "stage.json": Kind(_record, _recorded, as_json),
    "profile.json": Kind(_profile, _times, as_json),
    "report.json": Kind(_report, read_report, as_json),
    "history.jsonl": Kind(_history, lambda p: History(p).cut(2, 1), as_lines),
    "classes.json": Kind(_classes, read_class_map, as_json),
    "model.onnx": Kind(_onnx, lambda p: predicted(OnnxModel(p, threads=1)), as_onnx),
    "model.pt2": Kind(_pt2, lambda p: predicted(TorchProgram(p)), as_archive),
}
