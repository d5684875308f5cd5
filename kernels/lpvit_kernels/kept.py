"""Things made from a tensor once and kept as long as it lives unchanged: indices, packed weights, dense copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
_KEPT: Any = WeakTensorKeyDictionary()


def kept(tensor: Tensor, name: str, make: Callable[[], Made]) -> Made:
    """What `make()` gave for this tensor under this name; made anew after the tensor was changed in place.

    Changes that torch does not count (through `.data`) go unnoticed, unless the data moved.
    """
    state = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
    found = _KEPT.setdefault(tensor, {})
    if name not in found or found[name][0] != state:
        with torch.inference_mode(False), torch.no_grad():  # made while evaluating, it must serve training too
            found[name] = (state, make())
    made: Made = found[name][1]
    return made
