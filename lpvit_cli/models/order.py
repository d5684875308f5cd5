"""Features in another order: the same function, their tensors permuted together, and the proof that it is the same."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lpvit_cli.models.axes import Axis, Kind, Member, axes
from lpvit_cli.models.ordered import give_in_order, is_permutation

Model = TypeVar("Model", bound=nn.Module)
TOLERANCE = 1e-6  # of outputs in float64; some models round to float32 in between
KINDS: dict[Kind, str] = {
    "neurons": "hidden neurons",
    "values": "values of attention",
    "queries": "queries and keys",
    "residual": "residual channels",
}


@dataclass(frozen=True)
class Found(Generic[Model]):
    """A model in another order, the axes that moved, what of each lies where (order [size]: the old feature at each place),
    and what was left."""

    model: Model
    axes: list[Axis]
    orders: dict[str, Tensor]
    notes: list[str]


def permute_index(axis: Axis, scores: Tensor) -> Tensor:
    """The order [size] of the features with the cells of each group sorted by their mean score, the highest first."""
    cells = axis.cells.to(scores.device)
    by_score = scores[cells].mean(dim=2).argsort(dim=1, descending=True, stable=True)  # [groups, cells]
    order = torch.arange(axis.size, device=scores.device)
    order[cells.flatten()] = cells.take_along_dim(by_score[:, :, None], dim=1).flatten()
    return order.cpu()


def positions(member: Member, order: Tensor, length: int) -> Tensor:
    """What of the old tensor comes to each of its `length` places along the member's dimension."""
    places = torch.arange(length)
    places[member.index.flatten()] = member.index[:, order].flatten()
    return places


def reorder(model: nn.Module, found: Sequence[Axis], orders: Mapping[str, Tensor]) -> None:
    """Permute, in place, the features of the axes that `orders` names: feature order[i] comes to place i.

    Where a residual stream leaves the model it is gathered back into the original order.
    """
    with torch.no_grad():
        for axis in found:
            if axis.name not in orders:
                continue
            order = orders[axis.name]
            for member in axis.members:
                tensor = _tensor(model, member.tensor)
                places = positions(member, order, tensor.shape[member.dim])
                tensor.copy_(tensor.index_select(member.dim, places.to(tensor.device)))
            if axis.end is not None:
                give_in_order(model.get_submodule(axis.end), order.argsort())


def gather_at(model: nn.Module, name: str, order: Tensor) -> None:
    """Make the module `name` of a dense model gather, as a file says. Raises ValueError where that cannot be."""
    axis = _leaving(model, name)
    if axis is None or not is_permutation(order, axis.size):
        raise ValueError(f"{name}.order: no order of the features that leave the model there")
    give_in_order(model.get_submodule(name), order)


def prove(model: nn.Module, changed: nn.Module, images: Tensor) -> bool:
    """Whether both give the same for `images`, in float64."""
    return _same(_outputs(changed, images), _outputs(model, images))


def find_order(model: Model, found: Sequence[Axis], scores: Mapping[str, Tensor], images: Tensor) -> Found[Model]:
    """A copy of `model` with the features of the axes that `scores` names sorted, the highest first, as far as is proven.

    What changes the outputs for `images` is left: all axes of its kind. So are those of tensors with several names.
    """
    found, notes = _own(model, [axis for axis in found if axis.name in scores])
    orders = {axis.name: permute_index(axis, scores[axis.name]) for axis in found}
    orders = {name: order for name, order in orders.items() if not torch.equal(order, torch.arange(len(order)))}
    found = [axis for axis in found if axis.name in orders]
    expected = _outputs(model, images)

    def moved(some: Sequence[Axis]) -> Model | None:
        return _moved(model, some, orders, expected, images)

    if (whole := moved(found)) is not None:
        return Found(whole, found, orders, notes)
    kept: list[Axis] = []
    for kind, what in KINDS.items():
        tries = [[axis for axis in found if axis.kind == kind]]
        if kind == "residual":
            tries.append([axis for axis in _own(model, axes(model, end=""))[0] if axis.kind == kind and axis.name in orders])
        good = next((one for one in tries if one and moved(one) is not None), [])
        if any(tries) and not good:
            notes.append(f"{what} of this architecture stay in their order: its outputs depend on it")
        kept += good
    if (whole := moved(kept)) is None:
        whole, kept = copy.deepcopy(model), []
        notes.append("all features stay in their order: the outputs depend on it when they move together")
    return Found(whole, kept, {axis.name: orders[axis.name] for axis in kept}, notes)


def _own(model: nn.Module, found: Sequence[Axis]) -> tuple[list[Axis], list[str]]:
    """The axes all of whose tensors have one name, and a note on the others."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    shared = {name: " = ".join(same) for same in names.values() if len(same) > 1 for name in same}
    left = {axis.name: shared[m.tensor] for axis in found for m in axis.members if m.tensor in shared}
    told = [f"{axis} ({tensors})" for axis, tensors in left.items()]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    notes = [f"in their order for tensors that have several names: {', '.join(told[:3])}{more}"] if told else []
    return [axis for axis in found if axis.name not in left], notes


def _moved(model: Model, found: Sequence[Axis], orders: Mapping[str, Tensor], expected: Tensor, images: Tensor) -> Model | None:
    """A copy in another order; None where it does not give what is `expected`."""
    moved = copy.deepcopy(model)
    try:
        reorder(moved, found, orders)
        given = _outputs(moved, images)
    except Exception:  # a wrong guess may break any code
        return None
    return moved if _same(given, expected) else None


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        given: Tensor = copy.deepcopy(model).double().eval()(images.double())
    return given


def _same(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and bool((given - expected).norm() <= TOLERANCE * expected.norm())


def _leaving(model: nn.Module, end: str) -> Axis | None:
    return next((axis for axis in axes(model, end) if axis.end == end), None)


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor
