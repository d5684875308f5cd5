"""examples/predict_onnx.py: an exported file, used without lpvit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from lpvit_cli.data.transforms import transform_for
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.models.folder import PREPROCESSING

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_onnx.py"
ALONE = "import sys; sys.modules['lpvit_cli'] = sys.modules['torch'] = sys.modules['timm'] = None; "


@pytest.mark.parametrize(("crop_pct", "interpolation"), [(1.0, "bilinear"), (0.9, "bicubic")])
def test_it_gives_the_models_class_without_lpvit_or_torch(tmp_path: Path, crop_pct: float, interpolation: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=50
    )
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        **{"input_size": (3, 32, 32), "crop_pct": crop_pct, "interpolation": interpolation, "mean": (0.2, 0.4, 0.6)},
        "label_names": [f"class {index}" for index in range(50)],
    }
    for name, parameter in model.named_parameters():  # no constants: what differs between images decides
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.0 if name == "pos_embed" else 0.3)
    config = {"preprocessing": {key: value for key, value in model.pretrained_cfg.items() if key in PREPROCESSING}}
    save_onnx(dense_graph(model.eval(), 20), tmp_path / "model.onnx", config)
    generator = torch.Generator().manual_seed(1)
    names = []
    for number, (width, height) in enumerate([(32, 32), (90, 61), (40, 77)] * 3):
        color, noise = torch.rand(3, generator=generator), torch.rand(6, 6, 3, generator=generator)
        coarse = (255 * (0.7 * color + 0.3 * noise)).to(torch.uint8)
        names.append(tmp_path / f"{number}.png")
        Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC).save(names[-1])
    code = f"{ALONE}import runpy; sys.argv = {json.dumps(['x', str(tmp_path / 'model.onnx'), *map(str, names)])}; "
    code += f"runpy.run_path({str(EXAMPLE)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    with torch.inference_mode():
        expected = [int(model(transform_for(model)(Image.open(name))[None]).argmax()) for name in names]
    assert len(set(expected)) > 3
    assert done.stdout.splitlines() == [f"{name} {best} class {best}" for name, best in zip(names, expected, strict=True)]
