"""predict: the likeliest classes of image files, by any model lpvit can open."""

from __future__ import annotations

from pathlib import Path

import torch

from lpvit_cli.data.transforms import channels_of, read_image, transform_for, turns
from lpvit_cli.devices import describe_device, pick_device
from lpvit_cli.errors import UsageError
from lpvit_cli.export.opening import open_model
from lpvit_cli.report.schema import Prediction, PredictReport
from lpvit_cli.sparse import freeze
from lpvit_cli.targets.base import ExportedModel


def predict(model_name: str, images: list[Path], top: int, device_name: str) -> PredictReport:
    model, _ = open_model(model_name)
    if model.num_classes == 0:
        raise UsageError(
            f"{model_name}: gives embeddings, it has no classes to predict",
            f"run: lpvit embed {model_name} {images[0]} --output embeddings.npy",
        )
    device = torch.device("cpu") if isinstance(model, ExportedModel) else pick_device(device_name)
    model = freeze(model.eval().to(device), 1)
    transform = transform_for(model)
    names = model.pretrained_cfg.get("label_names") or imagenet_names(model.num_classes)
    predictions = []
    for path in images:
        image = transform(read_image(path, channels_of(model), turns(model)))[None].to(device)
        with torch.inference_mode():
            best = model(image)[0].float().softmax(dim=0).topk(min(top, model.num_classes))
        classes = best.indices.tolist()
        predictions.append(
            Prediction(
                image=str(path),
                classes=classes,
                names=[names[c] for c in classes] if names else None,
                probabilities=best.values.tolist(),
            )
        )
    return PredictReport(device=describe_device(device), model=model_name, predictions=predictions)


def imagenet_names(num_classes: int) -> list[str] | None:
    """timm's pretrained models with 1,000 classes tell ImageNet-1k's apart."""
    if num_classes != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(num_classes)]
