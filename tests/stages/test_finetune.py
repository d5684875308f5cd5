"""What recovery refuses, and what it leaves: filled zeros, ranks and globs, teachers, changed settings, history, adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import relative, run_cli
from torch import nn

from lpvit_cli.cli.console import Console
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.models.folder import load_model
from lpvit_cli.recipe.finetune import FinetuneSection
from lpvit_cli.recovery.lora import load_adapted
from lpvit_cli.recovery.start import ranks_of
from lpvit_cli.sparse import sparse_layers, sparsify
from lpvit_cli.sparse.masks import block_masks, require_same_masks
from lpvit_cli.stages import finetune
from lpvit_cli.tasks.evaluation import Validation
from lpvit_cli.tasks.quality import ClassificationQuality

MASK = torch.tensor([[True, False], [False, True]] * 8)
SMALL = [
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, num_classes: 10}",
    "data.dataset=synthetic",
    "data.batch_size=8",
    "calibrate.images=16",
    "calibrate.batch_size=8",
    "prune.block=[16,16]",
    "finetune.epochs=2",
    "finetune.rank=8",
    "finetune.init_batches=2",
]
OPTIONS = [option for change in SMALL for option in ("--set", change)]


def pruned(model: nn.Module) -> nn.Module:
    sparsify(model, {"blocks.0.mlp.fc1": MASK}, (8, 16))
    sparsify(model, {"blocks.1.attn.qkv": MASK[:12]}, (8, 16))
    return model


def test_a_block_that_came_back_is_found(tiny_vit: nn.Module) -> None:
    before = block_masks(pruned(tiny_vit))
    require_same_masks(before, {name: mask.clone() for name, mask in before.items()})
    filled = {name: torch.ones_like(mask) for name, mask in before.items()}
    for after in (filled, {}, {**before, "another": MASK}):
        with pytest.raises(CheckFailed, match="zero blocks were filled") as caught:
            require_same_masks(before, after)
        assert caught.value.exit_code == 4


def test_ranks_are_for_all_layers_or_by_the_first_glob_that_matches(tiny_vit: nn.Module) -> None:
    model = pruned(tiny_vit)  # 128 x 32 and 96 x 32
    assert ranks_of(model, FinetuneSection(rank=16)) == {"blocks.0.mlp.fc1": 16, "blocks.1.attn.qkv": 16}
    assert ranks_of(model, FinetuneSection(rank={"*.mlp.*": 4, "*": 2})) == {"blocks.0.mlp.fc1": 4, "blocks.1.attn.qkv": 2}
    assert ranks_of(model, FinetuneSection(rank={"*.qkv": 3})) == {"blocks.1.attn.qkv": 3}
    assert ranks_of(model, FinetuneSection(method="full")) == {}


def test_ranks_must_fit_and_globs_must_match(tiny_vit: nn.Module) -> None:
    model = pruned(tiny_vit)
    with pytest.raises(
        UsageError, match=r"finetune.rank: 17 is too large: LoRA-GA needs twice.*blocks.0.mlp.fc1 has 32"
    ) as caught:
        ranks_of(model, FinetuneSection(rank=17))
    assert caught.value.hint == "use at most 16 there"
    ranks_of(model, FinetuneSection(rank=32, method="lora"))
    with pytest.raises(UsageError, match="33 is too large: LoRA needs the rank"):
        ranks_of(model, FinetuneSection(rank=33, method="lora"))
    with pytest.raises(UsageError, match=r"'\*\.mlp\.fc3' matches no pruned layer") as caught:
        ranks_of(model, FinetuneSection(rank={"*.mlp.fc3": 4}))
    assert "blocks.0.mlp.fc1" in caught.value.hint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery") / "run"
    for command in ("calibrate", "prune"):
        result = run_cli(command, "digits_vit", "-o", folder, *OPTIONS)
        assert result.code == 0, result.err
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


def recover(folder: Path, *changes: str):  # type: ignore[no-untyped-def]
    options = [option for change in changes for option in ("--set", change)]
    return run_cli("finetune-lora-ga", "digits_vit", "-o", folder, *OPTIONS, *options)


@pytest.mark.parametrize("method", ["lora_ga", "lora", "full"])
def test_every_method_leaves_a_model_its_history_and_its_adapter(run: Path, method: str) -> None:
    # a rate at which the second epoch is sure to be another model than the first; the labels mean nothing
    result = recover(run, f"finetune.method={method}", "finetune.lr=0.02")
    assert result.code == 0, result.err
    made = run / "finetuned"
    report = json.loads((made / "report.json").read_text())
    entries = [json.loads(line) for line in (made / "history.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "step" in e] == list(range(1, 17))
    assert [e for e in entries if "step" not in e] == report["history"]
    assert (made / "history.svg").read_text().startswith("<svg")
    top1 = [report["accuracy_pruned"]["top1"], *(epoch["validation_top1"] for epoch in report["history"])]
    assert report["accuracy"]["top1"] == top1[report["best_epoch"]] == max(top1)
    before, after = sparse_layers(load_model(run / "pruned")), sparse_layers(load_model(made))
    assert all(torch.equal(before[name].weight.block_mask, after[name].weight.block_mask) for name in before)
    moments = 2 * 4 * report["trainable_parameters"]  # two numbers of four bytes for each, and a few counts of steps
    assert moments < report["optimizer_bytes"] < 1.05 * moments
    assert (made / "adapter.safetensors").is_file() == (method != "full")
    if method != "full":
        x = torch.randn(2, 3, 32, 32)
        assert relative(load_adapted(run / "pruned", made)(x), load_model(made)(x)) < 1e-5


def test_an_adapter_is_merged_on_demand(run: Path) -> None:
    assert recover(run, "finetune.lr=0.02").code == 0
    out = run.parent / "merged"
    for adapter in (run / "finetuned", run / "finetuned" / "adapter.safetensors"):
        result = run_cli("merge", run / "pruned", adapter, "-o", out, "--overwrite")
        assert result.code == 0, result.err
        x = torch.randn(2, 3, 32, 32)
        assert relative(load_model(out)(x), load_model(run / "finetuned")(x)) < 1e-5
    assert "exists already" in run_cli("merge", run / "pruned", adapter, "-o", out).err
    for taken in (run, run / "pruned", run / "finetuned"):  # no model folders, or artefacts of a run
        assert run_cli("merge", run / "pruned", adapter, "-o", taken, "--overwrite").code == 2
    assert run_cli("merge", run / "pruned", run / "pruned", "-o", run.parent / "no").code == 2
    assert sorted(p.name for p in run.parent.iterdir()) == ["merged", "run"]


@pytest.mark.parametrize("teacher", ["{name: vit_tiny_patch16_224, kwargs: {num_classes: 12}}"])
def test_a_teacher_of_other_classes_is_refused(run: Path, teacher: str) -> None:
    result = recover(run, f"finetune.distill.teacher={teacher}")
    assert result.code == 2
    assert "finetune.distill.teacher: gives 12 classes, the model 10" in result.err
    assert not (run / "finetuned").exists()


def test_another_timm_model_teaches(run: Path) -> None:
    teacher = "{name: vit_tiny_patch16_224, kwargs: {img_size: 48, embed_dim: 32, depth: 1, num_heads: 2, num_classes: 10}}"
    result = recover(run, f"finetune.distill={{kind: hard, teacher: {teacher}}}", "finetune.epochs=1")
    assert result.code == 0, result.err


def test_going_on_with_other_settings_names_the_key(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Console, what: str, done: int, total: int, detail: str) -> None:
        if what == "recovering" and detail.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Console, "progress", interrupt)
        assert recover(run).code == 130
    result = recover(run, "finetune.lr=0.5")
    assert result.code == 2
    assert "begun with other settings: finetune.lr was 0.0003, is 0.5" in result.err
    assert "--no-resume" in result.err
    assert "resumed after step 8" in recover(run).out, "what was refused has lost nothing"


def test_a_diverged_recovery_keeps_its_last_good_state(run: Path) -> None:
    result = recover(run, "finetune.lr=1e30", "finetune.warmup_epochs=0")
    assert result.code == 4
    assert "recovery diverged" in result.err
    assert not (run / "finetuned").exists()
    assert recover(run).code == 0, "no state was kept that other settings could spoil"


def test_labels_that_the_head_does_not_have_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpvit_cli.data.readers import SyntheticReader

    given = SyntheticReader.__getitem__
    monkeypatch.setattr(SyntheticReader, "__getitem__", lambda self, i: (given(self, i)[0], 10 if i == 5 else 0))
    result = recover(run)
    assert result.code == 2
    assert "an image has label 10, but the model has classes 0 to 9" in result.err


MAXVIT = [  # convolutions with BatchNorm between block and grid attention
    "model.name=maxvit_rmlp_pico_rw_256",
    "model.kwargs={img_size: 64, embed_dim: [32, 64], depths: [1, 1], block_type: [M, M], stem_width: 8, num_classes: 10}",
    "prune.layers.include=['*.mlp.fc1', '*.mlp.fc2']",
    "prune.layers.exclude=['*.rel_pos.*']",
]


@pytest.mark.parametrize("best", [0, 1])
def test_a_model_with_batch_norm_is_written_as_it_was_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    """Its statistics move in training: those of the best epoch are written, and go with the adapter too."""
    folder, validated = tmp_path / "run", []
    given = Validation.quality

    def quality(self: Validation, model: nn.Module, what: str, neighbours: bool = True) -> ClassificationQuality:
        found = given(self, model, what, neighbours)
        if what != "validating":
            return found
        validated.append({name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name})
        scores[len(validated)] = found
        return replace(found, top1=found.top1 + (1000 if len(validated) == best else -1000))

    def judge(found: ClassificationQuality, expected: ClassificationQuality, epoch: int) -> None:
        assert epoch == best
        require_same_quality(found, scores.get(best, expected), epoch)

    scores: dict[int, ClassificationQuality] = {}
    require_same_quality = finetune.require_same_quality
    monkeypatch.setattr(Validation, "quality", quality)
    monkeypatch.setattr(finetune, "require_same_quality", judge)
    for command in ("calibrate", "prune"):
        result = run_cli(command, "digits_vit", "-o", folder, *OPTIONS, *(o for change in MAXVIT for o in ("--set", change)))
        assert result.code == 0, result.err
    result = recover(folder, *MAXVIT, "finetune.rank=4", "finetune.lr=0.01")
    assert result.code == 0, result.err
    before, after = (load_model(folder / name).state_dict() for name in ("pruned", "finetuned"))
    expected = {name: before[name] for name in validated[0]} if best == 0 else validated[best - 1]
    assert len(expected) > 10
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in validated[0].items()), "training moves no statistics"
    x = torch.randn(2, 3, 64, 64)
    made = load_model(folder / "finetuned")(x)
    assert relative(load_adapted(folder / "pruned", folder / "finetuned")(x), made) < 1e-4


def test_a_written_model_that_scores_otherwise_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Validation.quality

    def quality(self: Validation, model: nn.Module, what: str, neighbours: bool = True) -> ClassificationQuality:
        found = given(self, model, what, neighbours)
        return replace(found, top1=100 - found.top1) if what == "evaluating the recovered model" else found

    monkeypatch.setattr(Validation, "quality", quality)
    result = recover(run)
    assert result.code == 4
    assert "the recovered model scores" in result.err
    assert not (run / "finetuned").exists()


def test_merged_weights_may_turn_some_images() -> None:
    finetune.require_same_quality(ClassificationQuality(100, 50.0, 90.0), ClassificationQuality(100, 53.9, 90.0), 2)
    for written in (49.0, 59.0):
        with pytest.raises(CheckFailed, match=r"epoch 2 scored 54\.00 %"):
            finetune.require_same_quality(ClassificationQuality(100, written, 90.0), ClassificationQuality(100, 54.0, 90.0), 2)
    with pytest.raises(CheckFailed, match=r"scores 50\.00 % as written, the pruned model \(epoch 0\) scored 100\.00 %"):
        finetune.require_same_quality(ClassificationQuality(100, 50.0, 90.0), ClassificationQuality(100, 100.0, 100.0), 0)
