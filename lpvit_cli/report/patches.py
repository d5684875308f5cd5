"""Which patches of an image have become one token after the last block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.data.batches import Batches
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.tokens.blocks import merging_of
from lpvit_cli.tokens.merge import TokenMerge, match

PHOTOS = 4


def places_of(model: VisionModel, images: Tensor) -> Tensor:
    """[n, patches]: the token at which each patch of images [n, C, H, W] is after the last merge."""
    places: list[Tensor] = []

    def follow(merge: TokenMerge, args: Any) -> None:
        x, r = args[0], merge.removed(args[0].shape[1])
        now = match(x, merge.prefix, r).places() if r else torch.arange(x.shape[1]).expand(x.shape[:2])
        places.append(now.gather(1, places[-1]) if places else now)

    handles = [part.register_forward_pre_hook(follow) for part in model.modules() if isinstance(part, TokenMerge)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    merging = merging_of(model)
    assert merging is not None
    return places[-1][:, merging.prefix :]


def merged_photos(model: VisionModel, batches_for: Callable[[VisionModel], Batches]) -> list[tuple[Any, Any]]:
    """Some images, as arrays [H, W, 3] in 0..1, and the same with the patches of each token in the colour of their mean; none
    of a model that merges nothing."""
    if merging_of(model) is None:
        return []
    images = torch.cat([images for images, _ in batches_for(model).some(PHOTOS)])
    places = places_of(model, images)
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    shown = (images * std + mean).clamp(0, 1)
    height, width = images.shape[2:]
    across = round((places.shape[1] * width / height) ** 0.5)  # square patches
    down = places.shape[1] // across
    colours = torch.nn.functional.adaptive_avg_pool2d(shown, (down, across)).flatten(2).transpose(1, 2)  # [n, patches, C]
    tokens, there = int(places.max()) + 1, places.unsqueeze(-1).expand(colours.shape)
    sums = torch.zeros(len(places), tokens, colours.shape[2]).scatter_add(1, there, colours)
    counts = torch.zeros(len(places), tokens, colours.shape[2]).scatter_add(1, there, torch.ones_like(colours))
    means = (sums / counts.clamp(min=1)).gather(1, there).unflatten(1, (down, across))
    return [(_array(before.permute(1, 2, 0)), _array(after)) for before, after in zip(shown, means, strict=True)]


def _array(image: Tensor) -> Any:
    """Images of other than three channels in grey."""
    return (image if image.shape[-1] == 3 else image.mean(dim=-1, keepdim=True).expand(*image.shape[:2], 3)).numpy()
