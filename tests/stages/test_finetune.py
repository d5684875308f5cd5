"""What recovery refuses: filled zeros, ranks too large, losses that are no number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lpvit_cli.errors import CheckFailed, UsageError
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
