"""Things made from a tensor once and kept as long as it lives unchanged: indices, packed weights, dense copies.

Changes are noticed by the count that torch keeps of them. Not counted are changes through `.data` or numpy, and steps of fused
optimizers. The gradient of a weight's values therefore drops what is kept of them: a step of training follows it. Whoever makes
other uncounted changes calls `lpvit_kernels.forget(weight)`; so does who takes a fused step after using the weight once more
since its gradient, or evaluates under autocast, not compiled, what is trained under autocast and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")
_MEMO: Any = WeakTensorKeyDictionary()


def memo(tensor: Tensor, name: str, make: Callable[[], Made], among: Any = _MEMO) -> Made:
    """What `make()` gave for this tensor under this name; made anew after the tensor was changed in place.

    Changes of inference tensors are not counted: of them nothing is kept.
    """
    if tensor.is_inference():
        return _made(make)
    state = (tensor.data_ptr(), tensor._version)
    found = among.setdefault(tensor, {})
    if name not in found or found[name][0] != state:
        found[name] = (state, _made(make))
    made: Made = found[name][1]
    return made


def drop(*tensors: Tensor) -> None:
    """Drop what is kept of these tensors."""
    for tensor in tensors:
        _MEMO.pop(tensor, None)


def _made(make: Callable[[], Made]) -> Made:
    with torch.inference_mode(False), torch.no_grad():  # made while evaluating, it must serve training too
        return make()
