"""Another library's model as lpvit asks for one: images in, one tensor out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lpvit_cli.errors import UsageError
from lpvit_cli.models.protocol import VisionModel

DIMENSIONS = {"logits": 2, "pooled": 2, "tokens": 3}
WRONG_TASK = "choose another with --set model.output=..., or --set task=features --set features=pooled (or tokens)"


class Wrapper(VisionModel):
    """`model` with one of its outputs chosen: by name or position, None where it gives a tensor."""

    def __init__(self, model: nn.Module, output: str | int | None, gives: str, num_classes: int):
        super().__init__()
        self.model, self.output, self.gives, self.num_classes = model, output, gives, num_classes
        self.pretrained_cfg = {}

    def forward(self, images: Tensor) -> Tensor:
        return pick(self.model(images), self.output)

    def get_classifier(self) -> Any:
        """The head, where the model tells it as timm's do."""
        return self.model.get_classifier() if hasattr(self.model, "get_classifier") else None  # type: ignore[operator]


def pick(result: Any, output: str | int | None) -> Tensor:
    """The tensor at `output`, a name or a position, of what a model gives. Raises UsageError that lists what is there."""
    if isinstance(result, Tensor):
        if output is not None:
            raise UsageError(
                f"model.output: {output!r}, but the model gives one tensor, and nothing to choose from", "leave it out"
            )
        return result
    items = list(
        result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, tuple | list) else ()
    )
    chosen = dict(items).get(output)
    if chosen is None and isinstance(output, int) and 0 <= output < len(items):
        chosen = items[output][1]
    if isinstance(chosen, Tensor):
        return chosen
    if output is None:
        message = f"model.output: the model gives no tensor but a {type(result).__name__}"
    else:
        message = f"model.output: the model gives no tensor called {output!r}"
    raise UsageError(message, f"choose one of: --set model.output={' | '.join(outputs_in(result)) or '(there are none)'}")


def outputs_in(result: Any) -> list[str]:
    """The names, or positions, of the tensors in what a model gives."""
    items = result.items() if isinstance(result, Mapping) else enumerate(result) if isinstance(result, tuple | list) else ()
    return [str(name) for name, value in items if isinstance(value, Tensor)]


def give_once(model: nn.Module, input_size: tuple[int, int, int]) -> Any:
    """What the model gives for one black image. Raises UsageError where it does not take one of that size."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        try:
            return model(torch.zeros(1, *input_size, device=device))
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # any code may run here
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no details"
            raise UsageError(
                f"model: an image of {list(input_size)} does not go through it: {type(error).__name__}: {reason}",
                "set the size it takes: --set 'model.preprocess.input_size=[3,224,224]'",
            ) from error


def require_shape(result: Any, gives: str) -> None:
    """Raise UsageError unless the output is a tensor with the dimensions of logits, pooled embeddings or tokens."""
    result = pick(result, None)
    if result.ndim != DIMENSIONS[gives]:
        raise UsageError(f"model: its output {list(result.shape)} of one image is no {gives}", WRONG_TASK)
