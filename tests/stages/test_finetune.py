"""Recovery learns with each optimizer; what it refuses: filled zeros, ranks too large, losses that are no number."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from lpvit_cli.curvature.mfac import MFAC
from lpvit_cli.errors import CheckFailed, UsageError
from lpvit_cli.lora import adapt
from lpvit_cli.lora.train import Trainer, distilled_loss
from lpvit_cli.recipe import FinetuneSection
from lpvit_cli.sparse import sparsify
from lpvit_cli.stages.finetune import block_masks, require_finite, require_rank, require_same_masks

MASK = torch.tensor([[True, False], [False, True]] * 8)


def pruned(model: nn.Module, mask: torch.Tensor) -> nn.Module:
    sparsify(model, {"blocks.0.mlp.fc1": mask}, (8, 16))
    return model


def test_a_block_that_came_back_is_found(tiny_vit: nn.Module) -> None:
    before = block_masks(pruned(tiny_vit, MASK))
    require_same_masks(before, {name: mask.clone() for name, mask in before.items()})
    filled = {name: torch.ones_like(mask) for name, mask in before.items()}
    for after in (filled, {}, {**before, "another": MASK}):
        with pytest.raises(CheckFailed, match="zero blocks were filled") as caught:
            require_same_masks(before, after)
        assert caught.value.exit_code == 4


def test_rank_must_fit_twice_into_the_smallest_layer(tiny_vit: nn.Module) -> None:
    model = pruned(tiny_vit, MASK)  # 128 x 32
    require_rank(16, model)
    with pytest.raises(UsageError, match=r"finetune.rank: 17 is too large.*the smallest has 32") as caught:
        require_rank(17, model)
    assert caught.value.hint == "use at most 16"


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_diverged_recovery_is_a_failed_check(loss: float) -> None:
    require_finite(0.3, "epoch 1/2")
    with pytest.raises(CheckFailed, match="recovery diverged: the loss is (nan|inf) in epoch 1/2"):
        require_finite(loss, "epoch 1/2")


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("mfac", MFAC)])
def test_each_optimizer_lowers_the_loss(tiny_vit: nn.Module, tmp_path: Path, optimizer: str, kind: type) -> None:
    model = pruned(tiny_vit, MASK)
    adapt(model, rank=4, alpha=8.0)
    settings = FinetuneSection(optimizer=optimizer, epochs=20, lr=3e-2, distill=None, mfac={"window": 8})
    templates, labels = torch.randn(5, 3, 32, 32), torch.randint(5, (4, 16))
    batches = [(templates[y], y) for y in labels]
    trainer = Trainer(model, settings, len(batches), tmp_path / "checkpoint.safetensors", seed=0)
    assert type(trainer.optimizer) is kind
    loss_of = distilled_loss(model, None, None, 0.0, torch.device("cpu"))
    while len(trainer.history) < settings.epochs:
        trainer.epoch(batches, loss_of, nullcontext, torch.amp.GradScaler("cpu", enabled=False), lambda *progress: None)
    assert trainer.history[-1].loss < trainer.history[0].loss / 4
