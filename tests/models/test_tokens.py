"""All tokens of timm models: of one shape [n, tokens, features], whatever their last map of features looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small import one_line

from lpvit_cli.errors import UsageError
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import load_model, model_config, save_model
from lpvit_cli.recipe.model import ModelSection

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (1, 1), "num_heads": (3, 6), "window_size": 4},  # [n, H, W, C]
    "samvit_base_patch16": {"img_size": 64, "depth": 1, "embed_dim": 48, "global_attn_indexes": ()},  # [n, C, H, W]
    "coatnet_pico_rw_224": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "fastvit_t8": {"layers": (1, 1, 1, 1)},
    "poolformer_s12": {},
}


@pytest.mark.parametrize("name", SMALL)
def test_tokens_have_one_shape(tmp_path: Path, name: str) -> None:
    section = ModelSection(name=name, kwargs=SMALL[name])
    model = build_model(section, "features", "tokens")
    plain: Any = timm.create_model(name, **SMALL[name]).eval()
    plain.reset_classifier(0, "")
    plain.load_state_dict(model.state_dict())  # names of tensors are timm's
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        tokens, theirs = model(x), plain(x)
    assert tokens.ndim == 3
    assert tokens.shape[2] == plain.num_features
    if theirs.ndim == 4:
        last = theirs if theirs.shape[3] == plain.num_features else theirs.permute(0, 2, 3, 1)
        theirs = last.reshape(2, -1, plain.num_features)
    assert torch.equal(tokens, theirs)
    save_model(tmp_path, model, model_config(section, model))
    with torch.no_grad():
        assert load_model(tmp_path)(x).shape == tokens.shape


def test_a_model_that_cannot_give_its_tokens() -> None:
    for name in ("crossvit_9_240", "shvit_s1"):
        with torch.device("meta"), pytest.raises(UsageError, match="features: tokens: .* cannot give all its tokens") as caught:
            build_model(ModelSection(name=name), "features", "tokens")
        assert "features=pooled" in caught.value.hint
        one_line(caught.value)
