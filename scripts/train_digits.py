"""Train the demo's dense ViT on the digits and write its weights, with the accuracy reached in their metadata.

    python scripts/train_digits.py            # about 2 minutes on 2 cores

The architecture is that of configs/digits_vit.yaml. Same seed, same machine: same weights.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli import Recipe
from lpvit_cli.data.batches import batches
from lpvit_cli.data.readers import open_images
from lpvit_cli.models.build import build_model
from lpvit_cli.tasks.classification import Classification

WEIGHTS = Path(__file__).parent.parent / "configs" / "weights" / "digits_vit.safetensors"


def shifted(images: Tensor, pixels: int = 3) -> Tensor:
    """Each image moved by up to `pixels`, the border repeated."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    moves = torch.randint(0, 2 * pixels + 1, (n, 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, moves, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()

    recipe = Recipe.load("digits_vit", ["model.weights=null"])
    torch.manual_seed(args.seed)
    model = build_model(recipe.model, recipe.task, recipe.features)
    train = batches(model, open_images(recipe.data, "train", model), recipe.data, shuffle=True, seed=args.seed)
    val = batches(model, open_images(recipe.data, "validation", model), recipe.data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    steps, started = args.epochs * len(train), time.monotonic()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / len(train)) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train.epoch(epoch):
            loss = F.cross_entropy(model(shifted(images)), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1:2d}/{args.epochs}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)

    model.eval()
    score = Classification().score()
    with torch.no_grad():
        for images, labels in val:
            score.add(model(images), None, labels)
    result = score.quality()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"top-1 {result.top1:.2f} % on {result.images} test images, {parameters:,} parameters")
    metadata = {
        "top1": f"{result.top1:.2f}",
        "test_images": str(result.images),
        "made_by": "scripts/train_digits.py",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
        "dataset": "scikit-learn digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.output, metadata=metadata)


if __name__ == "__main__":
    main()
