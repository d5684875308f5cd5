"""What `lpvit embed` keeps of the model's own throughput at batch 32, on real photos.

    python scripts/real_vit.py OUT
    python scripts/bench_embed.py OUT --output benchmarks/results/embed_cpu.json

Rounds of both in turn: the model alone, on images that lie in memory, and `embed` on their files, decoding included; each
`embed` beside the mean of the model before and after it, since the speed of a shared machine drifts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from results import publish

from lpvit_cli.commands.embed import embed
from lpvit_cli.data.transforms import read_image, transform_for
from lpvit_cli.models.build import build_model
from lpvit_cli.models.folder import load_model, model_config, save_model
from lpvit_cli.recipe.model import ModelSection

BATCH, IMAGES, ROUNDS = 32, 128, 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="what scripts/real_vit.py wrote")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args()
    files = sorted((args.out / "photos" / "train").iterdir())[:IMAGES]
    kwargs: dict[str, Any] = {"img_size": 224}
    section = ModelSection(
        name="vit_small_patch14_dinov2", weights=(args.out / "dinov2_vits14.safetensors").resolve(), kwargs=kwargs
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        built = build_model(section)
        save_model(folder, built, model_config(section, built))
        model = load_model(folder)
        images = torch.stack([transform_for(model)(read_image(file)) for file in files])
        rounds, before = [], alone(model, images)
        for _ in range(ROUNDS):
            report = embed(str(folder), files, Path(scratch) / "e.npy", BATCH, "cpu", "float32", lambda *told: None)
            after = alone(model, images)
            rounds.append({"model": (before + after) / 2, "embed": report.images_per_second})
            before = after
            print({key: round(value, 1) for key, value in rounds[-1].items()}, flush=True)
    share = median(one["embed"] / one["model"] for one in rounds)
    publish("bench_embed", ("torch", "timm"), args.output, batch=BATCH, images=IMAGES, rounds=rounds, share=share)


def alone(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Images a second."""
    began = time.monotonic()
    with torch.inference_mode():
        for batch in images.split(BATCH):
            model(batch)
    return len(images) / (time.monotonic() - began)


if __name__ == "__main__":
    main()
