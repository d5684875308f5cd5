"""Every architecture through every step, small: build, calibrate and prune, load again, export to ONNX and compare.

    python scripts/try_models.py [PART OF A NAME ...]

Prints one line for each model. A step that fails prints its error; the exit code is the number of models that fail.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lpvit_cli as lpvit
from lpvit_cli.errors import LpvitError
from lpvit_cli.models.build import build_model, shrink
from lpvit_cli.models.folder import load_model, model_config, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.trim import trim
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import sparse_layers

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
WINDOWS = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (1, 2), "num_heads": (2, 4)}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
HF_MLP = {**HF, "intermediate_size": 64}
HF_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}

TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": VIT,
    "vit_base_patch16_clip_224": VIT,
    "vit_base_patch16_siglip_224": VIT,
    "vit_small_patch14_dinov2": VIT,
    "vit_small_patch14_reg4_dinov2": VIT,
    "vit_small_patch16_dinov3": VIT,
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4},
    "deit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": {**VIT, "embed_dim": 48},
    "flexivit_small": VIT,
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8},
    "samvit_base_patch16": {**VIT, "window_size": 2, "global_attn_indexes": (1,)},
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
    "swinv2_cr_tiny_224": {**WINDOWS, "window_size": 4},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 32, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "mvitv2_tiny": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {
        "img_size": 64,
        "embed_dim": (32, 64),
        "depths": (1, 1),
        "block_type": ("M", "M"),
        "stem_width": 8,
    },
    "maxvit_tiny_tf_224": {"img_size": 64, "embed_dim": (32, 64), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8},
    "coatnet_rmlp_nano_rw_224": {
        "img_size": 64,
        "embed_dim": (32, 64),
        "depths": (1, 1),
        "block_type": ("C", "T"),
        "stem_width": 8,
    },
    "xcit_nano_12_p16_224": {**VIT, "patch_size": 16, "img_size": 64},
    "cait_xxs24_224": VIT,
    "convit_tiny": {**VIT, "embed_dim": 8, "local_up_to_layer": 1},
    "volo_d1_224": {"img_size": 64, "mlp_ratio": 1},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "twins_pcpvt_small": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "levit_128s": {},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1)},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 224},
    "fastvit_t8": {},
    "fastvit_sa12": {},
    "efficientformer_l1": {},
    "nest_tiny": {"img_size": 64},
    "crossvit_tiny_240": {},
    "gcvit_xxtiny": {"img_size": 64},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "mobilevit_xxs": {},
    "pit_ti_224": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": HF_MLP,
    "ViTModel": HF_MLP,
    "DeiTForImageClassification": HF_MLP,
    "DeiTModel": HF_MLP,
    "Dinov2ForImageClassification": {**HF, "mlp_ratio": 2},
    "Dinov2Model": {**HF, "mlp_ratio": 2, "use_swiglu_ffn": True},
    "Dinov2WithRegistersForImageClassification": {**HF, "mlp_ratio": 2},
    "Dinov2WithRegistersModel": {**HF, "mlp_ratio": 2},
    "DINOv3ViTModel": HF_MLP,
    "SiglipVisionModel": HF_MLP,
    "CLIPVisionModel": HF_MLP,
    "CLIPVisionModelWithProjection": {**HF_MLP, "projection_dim": 16},
    "BeitForImageClassification": {**HF_MLP, "use_relative_position_bias": True},
    "BeitModel": HF_MLP,
    "SwinForImageClassification": HF_SWIN,
    "SwinModel": HF_SWIN,
}
STEPS = ("build", "prune", "load", "export", "smoke")
Result = dict[str, str]


def sections() -> dict[str, ModelSection]:
    made = {name: ModelSection(name=name, kwargs={**kwargs, "num_classes": 5}) for name, kwargs in TIMM.items()}
    for name, kwargs in TRANSFORMERS.items():
        head = {"num_labels": 5} if "ForImage" in name else {}
        made[name] = ModelSection(name=f"transformers:{name}", kwargs={**kwargs, **head})
    return made


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def attempt(section: ModelSection, folder: Path) -> Result:
    """What each step says; of the first that fails, its error."""
    result: Result = {}
    state: dict[str, Any] = {}

    def build() -> str:
        torch.manual_seed(0)
        model = build_model(section)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        state.update(
            model=model, layers=prunable_layers(model, Layers()), x=torch.randn(4, *model.pretrained_cfg["input_size"])
        )
        return f"{len(state['layers'])} layers of {len([m for m in model.modules() if isinstance(m, nn.Linear)])}"

    def prune() -> str:
        model = state["model"]
        task = "classification" if model.num_classes else "features"
        block = (8, 8) if all(min(layer.weight.shape) >= 8 for layer in state["layers"].values()) else (1, 1)
        pruned = lpvit.prune(
            model, state["x"], sparsity=0.4, block=block, layers=list(state["layers"]), task=task, method="wanda"
        )
        state["pruned"] = pruned
        return f"{len(sparse_layers(pruned))} sparse"

    def load() -> str:
        save_model(folder, state["pruned"], model_config(section, state["model"]))
        loaded = load_model(folder)
        with torch.no_grad():
            state["loaded"], state["expected"] = loaded, state["pruned"](state["x"])
            difference = max(relative(one(state["x"]), state["expected"]) for one in (loaded, trim(loaded)))
        if not difference < 1e-4:
            raise AssertionError(f"the model that was loaded differs by {difference:.1e}")
        return f"{difference:.0e}"

    def export() -> str:
        return f"{lpvit.export_onnx(state['pruned'], state['x'][:3], folder / 'model.onnx', form='rows').relative_error:.0e}"

    def smoke() -> str:
        name, kwargs = shrink(section)
        began = time.perf_counter()
        model = build_model(ModelSection(name=name, kwargs=kwargs))
        with torch.no_grad():
            model(torch.randn(2, *model.pretrained_cfg["input_size"]))
        return f"{model.pretrained_cfg['input_size'][1]} px, {time.perf_counter() - began:.1f} s"

    steps: dict[str, Callable[[], str]] = dict(zip(STEPS, (build, prune, load, export, smoke), strict=True))
    for name, step in steps.items():
        try:
            result[name] = step()
        except LpvitError as error:
            result["error"] = f"{name}: {error.message} | {error.hint}"
            return result
        except Exception as error:  # a fault of lpvit: shown as one
            result["error"] = f"{name}: BUG: {type(error).__name__}: {str(error).strip()[:300]}"
            if os.environ.get("TRACE"):
                raise
            return result
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="only models whose names hold one of these")
    parts = parser.parse_args().parts
    warnings.simplefilter("ignore")
    chosen = {name: one for name, one in sections().items() if not parts or any(part in name for part in parts)}
    failed = 0
    print(f"{'model':42}" + "".join(f"{step:16}" for step in STEPS))
    for name, section in chosen.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = attempt(section, Path(folder))
        cells = "".join(f"{result.get(step, '-'):16}" for step in STEPS)
        print(f"{name:42}{cells}{time.perf_counter() - began:5.1f} s", flush=True)
        if error := result.get("error"):
            failed += 1
            print(f"    {error}", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} models work")
    return failed


if __name__ == "__main__":
    sys.exit(main())
