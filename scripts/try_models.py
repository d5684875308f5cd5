"""Every architecture through every command, small: calibrate, prune, recover, export, and predict or embed from the file.

    python scripts/try_models.py [PART OF A NAME ...] [--output docs/architectures.md]

Prints one line for each model, and the error of a command that fails. The exit code is 1 where one fails in another way than
by a known error: those say why the architecture cannot be pruned.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lpvit_cli.cli import app
from lpvit_cli.errors import LpvitError
from lpvit_cli.machine import installed
from lpvit_cli.models.build import build_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.recipe.model import ModelSection
from lpvit_cli.recipe.prune import Layers

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
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
}
BACKBONES = ("vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224", "samvit_base_patch16")
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
STEPS = ("calibrate", "prune", "recover", "export", "predict")
WORKS = "works"
BLOCKS = (128, 64, 32, 8, 4, 1)  # the largest of these that fits all layers is the block's side


def sections() -> dict[str, ModelSection]:
    made = {name: ModelSection(name=name, kwargs={**kwargs, "num_classes": 5}) for name, kwargs in TIMM.items()}
    for name in BACKBONES:
        made[f"{name}, no head"] = ModelSection(name=name, kwargs={**TIMM[name], "num_classes": 0})
    for name, kwargs in TRANSFORMERS.items():
        head = {"num_labels": 5} if "ForImage" in name else {}
        made[name] = ModelSection(name=f"transformers:{name}", kwargs={**kwargs, **head})
    return made


def attempt(section: ModelSection) -> tuple[dict[str, str], float]:
    """What each command came to, and how many seconds they took."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        return outcomes(section, Path(folder)), time.perf_counter() - began


def outcomes(section: ModelSection, folder: Path) -> dict[str, str]:
    """By command WORKS, or the message of its error; nothing comes after an error."""
    recipe, photo, run = folder / "recipe.yaml", folder / "photo.png", folder / "run"
    try:
        model = write_recipe(section, recipe)
    except LpvitError as error:
        return {"calibrate": error.message}
    pixels = np.random.RandomState(0).randint(0, 256, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    file = run / "export" / "model.onnx"
    last = ["predict", file, photo] if model.num_classes else ["embed", file, photo, "--output", folder / "embedding.npy"]
    commands = {
        "calibrate": ["calibrate", recipe, "--output", run],
        "prune": ["prune", recipe, "--output", run],
        "recover": ["finetune-lora-ga", recipe, "--output", run],
        "export": ["export", recipe, "--output", run],
        "predict": last,
    }
    result: dict[str, str] = {}
    for step, words in commands.items():
        result[step] = outcome([str(word) for word in words])
        if result[step] != WORKS:
            break
    return result


def write_recipe(section: ModelSection, path: Path) -> Any:
    """A recipe with random weights, large enough that every layer matters; returns the model."""
    torch.manual_seed(0)
    model = build_model(section)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path.with_name("w.safetensors"))
    smallest = min(min(layer.weight.shape) for layer in prunable_layers(model, Layers()).values())
    side = next(side for side in BLOCKS if side <= smallest)
    content = {
        "name": "small",
        "model": {"name": section.name, "kwargs": json.loads(json.dumps(section.kwargs)), "weights": "w.safetensors"},
        "data": {"dataset": "synthetic", "batch_size": 8, "workers": 0, "val_images": 8},
        "calibrate": {"images": 16, "batch_size": 8},
        "prune": {"block": [side, side], "budget": {"sparsity": 0.4}, "reweigh": 0},
        "finetune": {"epochs": 1, "rank": 1, "lr": 1e-5, "init_batches": 1, "warmup_epochs": 0},
        "export": {"form": "rows", "max_drop": 100},
    }
    path.write_text(yaml.safe_dump(content))
    return model


def outcome(words: list[str]) -> str:
    """WORKS, or the error that the command prints."""
    printed, told = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(printed), redirect_stderr(told):
        try:
            app([*words, "--json"])
        except SystemExit as exit:
            code = exit.code
    if not code:
        return WORKS
    try:
        return str(json.loads(printed.getvalue())["error"]["message"])
    except (ValueError, KeyError):
        return f"BUG: {told.getvalue().strip().splitlines()[-1:]}"


def table(results: dict[str, dict[str, str]]) -> str:
    """The matrix as a page: a number where a command fails, its message below."""
    notes: dict[str, int] = {}

    def cell(text: str | None) -> str:
        if text is None or text == WORKS:
            return text or ""
        return f"[{notes.setdefault(text, len(notes) + 1)}](#why-not)"

    rows = [f"| {name} | {' | '.join(cell(result.get(step)) for step in STEPS)} |" for name, result in results.items()]
    versions = ", ".join(f"{package} {installed(package)}" for package in ("timm", "transformers", "torch", "onnxruntime"))
    why = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(
        [
            "# Architectures",
            "",
            "Each was made small, with random weights, and taken through the real commands on generated images: `calibrate`,",
            "`prune` (the default method, 40 % of the weights), `finetune-lora-ga`, `export` (ONNX, compared with the model),",
            "and `predict`, or `embed` for a model without a head, from the exported file. Made by `scripts/try_models.py`",
            f"with {versions}.",
            "",
            f"| architecture | {' | '.join(STEPS)} |",
            f"|---|{'---|' * len(STEPS)}",
            *rows,
            "",
            "## Why not",
            "",
            *(why or ["Every command worked."]),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="only models whose names hold one of these")
    parser.add_argument("--output", type=Path, help="write the matrix as a page of the documents")
    args = parser.parse_args()
    chosen = {name: one for name, one in sections().items() if not args.parts or any(part in name for part in args.parts)}
    results: dict[str, dict[str, str]] = {}
    fresh = multiprocessing.get_context("spawn")  # each with one thread of its own: the models are small
    with ProcessPoolExecutor(mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name, (result, seconds) in zip(chosen, pool.map(attempt, chosen.values()), strict=True):
            results[name], last = result, list(result.values())[-1]
            print(f"{name:44}{sum(text == WORKS for text in result.values())} of {len(STEPS)}  {seconds:5.1f} s", flush=True)
            if last != WORKS:
                print(f"    {last}", flush=True)
    if args.output:
        args.output.write_text(table(results), encoding="utf-8")
    return int(any("BUG" in text for result in results.values() for text in result.values()))


if __name__ == "__main__":
    sys.exit(main())
