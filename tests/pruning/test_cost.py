"""FLOPs against the closed form of each architecture, attention products included."""

from __future__ import annotations

import pytest
import timm
import torch

from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.pruning.cost import layer_cost
from lpvit_cli.recipe.prune import Layers, Power


def vit_flops(dim: int, depth: int, tokens: int = 197, patch: int = 16, classes: int = 1000) -> int:
    """Twice the multiply-adds of patch embedding, qkv + proj + MLP, both attention products, and the head."""
    patches = tokens - 1
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    return 2 * (patches * 3 * patch * patch * dim + depth * block + dim * classes)


def swin_flops(dim: int = 96, depths: tuple[int, ...] = (2, 2, 6, 2), window: int = 7, classes: int = 1000) -> int:
    side, macs = 56, 56 * 56 * 3 * 16 * 96
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        if stage:
            side //= 2
            macs += side * side * 2 * width * width  # patch merging: 4 x (width / 2) -> width
        tokens = side * side
        macs += depth * (tokens * 12 * width * width + 2 * tokens * window * window * width)
    return 2 * (macs + dim * 8 * classes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", vit_flops(192, 12)),
        ("deit_small_patch16_224", vit_flops(384, 12)),
        ("deit_base_patch16_224", vit_flops(768, 12)),
        ("swin_tiny_patch4_window7_224", swin_flops()),
    ],
)
def test_flops_equal_the_closed_form(name: str, expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    layers = prunable_layers(model, Layers())
    counted = count_flops(model, layers)
    assert counted.total == pytest.approx(expected, rel=1e-3)
    assert len(layers) == 48
    assert set(counted.tokens.values()) == ({197} if "swin" not in name else {3136, 784, 196, 49})


def test_counting_leaves_the_model_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_flops(model, prunable_layers(model, Layers()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_layer_cost_is_macs_and_bytes() -> None:
    """10 tokens, 6x8 weights in 4x4 blocks: 2 x 2 blocks, the lower ones 2 rows high."""
    cost = layer_cost(torch.nn.Linear(8, 6), 10, (4, 4), Power(e_mac_pj=2.0, e_byte_pj=3.0, batch_size=4))
    assert cost.weights.tolist() == [[16, 16], [8, 8]]
    assert cost.flops.tolist() == [[320, 320], [160, 160]]
    assert cost.energy_pj[0, 0] == 2 * 160 + 3 * 16 * 4 / 4
    assert cost.fixed_energy_pj == 3 * 10 * (8 + 6) * 4
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert cost.predicted_energy_uj(~nothing) == pytest.approx((2 * 480 + 3 * 48 + 1680) * 1e-6)
    assert cost.predicted_energy_uj(nothing) == pytest.approx(1680e-6)


def test_tokens_of_a_layer_that_is_called_twice_add_up() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.pretrained_cfg = torch.nn.Linear(4, 4), {"input_size": (3, 2, 4)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x)[:, :1])

    model = Twice()
    counted = count_flops(model, {"layer": model.layer})  # type: ignore[arg-type]
    assert counted.tokens == {"layer": 6 + 2}
    assert counted.total == 2 * 4 * 4 * (6 + 2)
