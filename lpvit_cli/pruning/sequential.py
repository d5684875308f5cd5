"""Sequential pruning: layers are pruned in the order in which they run, each on what the already pruned ones give it.

With x the dense model's inputs of a layer and x' the pruned prefix's, the new weight minimises ||x W^T - x' W'^T||^2 over the
kept blocks, so that a layer also makes up for the errors before it (the order of SparseGPT, arXiv 2301.00774, with the dense
model's output as target).

Each batch goes through each model once: its forward pass waits at every layer until that layer is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread, current_thread

import torch
from torch import Tensor, nn

from lpvit_cli.measure.memory import release_memory
from lpvit_cli.pruning.block_obs import compensated, removal_order
from lpvit_cli.pruning.blocks import Block, grid
from lpvit_cli.pruning.removal import Removal

CPU_BYTES = 4 * 2**30  # for the waiting forward passes
GPU_SHARE = 0.4  # of the GPU's memory, for the same


def images_that_fit(layer_inputs: list[int], device: torch.device) -> int:
    """How many images may wait at once. `layer_inputs`: values that one image feeds each layer.

    A waiting pass holds its layer's input and the residual stream, about twice the largest input, in float32, in two models.
    """
    gpu = device.type == "cuda"
    memory = GPU_SHARE * torch.cuda.get_device_properties(device).total_memory if gpu else CPU_BYTES
    return max(1, int(memory / (2 * 2 * 4 * max(layer_inputs))))


@dataclass(frozen=True)
class Target:
    """What a layer is to lose: blocks of this shape, until what is left costs no more than `kept`."""

    block: Block
    costs: Tensor  # of each block [rows, cols], in a unit that all layers share
    kept: float
    balanced: bool = False

    def removals(self, removal: Removal, spare: float) -> tuple[int, float]:
        """How many, with `spare` more to keep, and what then is spare. Other blocks may go than were planned, and at ragged
        edges they are smaller: their cost counts, not their number."""
        kept, allowed = removal.along(self.costs), self.kept + spare
        count = int((kept > allowed).sum())
        return count, allowed - float(kept[count])


def prune_sequentially(
    dense: nn.Module,
    model: nn.Module,
    targets: dict[str, Target],
    output_weights: dict[str, Tensor],
    batches: list[Tensor],
    on_layer: Callable[[str], None],
) -> dict[str, Tensor]:
    """Prune `model` (a copy of `dense`, changed in place) layer by layer; returns the block masks, in the order of running.

    `output_weights` [out, out] of each layer, as in `removal_order`; `batches`: images [n, 3, H, W] on the models' device, no
    more than `images_that_fit`.
    """
    masks: dict[str, Tensor] = {}
    spare = 0.0  # what earlier layers, in whole blocks, could not keep of their share
    with _passes(dense, list(targets), batches) as ahead, _passes(model, list(targets), batches) as behind:
        while stops := [stop for one in ahead if (stop := one.proceed())]:
            name = stops[0][0]
            given = [stop for one in behind if (stop := one.proceed())]
            if name in masks:  # called again; it has been pruned for its first call
                continue
            hessian, cross = _moments(stops, given)
            layer, target = model.get_submodule(name), targets[name]
            assert isinstance(layer, nn.Linear)
            weight = layer.weight.detach()
            everything = torch.ones(grid((weight.shape[0], weight.shape[1]), target.block), dtype=torch.bool)
            ideal = compensated(weight, hessian, everything, target.block, cross)
            found = removal_order(ideal, (hessian / 2).to(weight.dtype), target.block, output_weights[name])
            removal = Removal.greedy(*found, target.balanced)
            count, spare = target.removals(removal, spare)
            masks[name] = removal.mask(count)
            layer.weight.data = compensated(weight, hessian, masks[name], target.block, cross)
            on_layer(name)
            release_memory()
    return masks


Stop = tuple[str, Tensor]  # a layer, and what it is given [tokens, in]


def _moments(dense: list[Stop], pruned: list[Stop]) -> tuple[Tensor, Tensor]:
    """2/N sum x'^T x' and 2/N sum x^T x' [in, in], float64, over the N tokens of all batches."""
    size, device = dense[0][1].shape[1], dense[0][1].device
    hessian, cross = (torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(2))
    tokens = 0
    for (name, x), (name_pruned, x_pruned) in zip(dense, pruned, strict=True):
        assert name == name_pruned
        hessian += x_pruned.T @ x_pruned
        cross += x.T @ x_pruned
        tokens += len(x)
    return hessian.mul_(2 / tokens), cross.mul_(2 / tokens)


class _Abandoned(Exception):
    """Unwinds a forward pass that nobody waits for any more."""


class _Pass(Thread):
    """A forward pass that waits before each layer of interest; `proceed` lets it run on to the next one."""

    def __init__(self, model: nn.Module, images: Tensor):
        super().__init__(daemon=True)
        self.model, self.images = model, images
        self.stops: SimpleQueue[Stop | BaseException | None] = SimpleQueue()
        self.answers: SimpleQueue[bool] = SimpleQueue()

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.model(self.images)
            self.stops.put(None)
        except BaseException as error:
            self.stops.put(error)

    def wait_at(self, name: str, x: Tensor) -> None:
        self.stops.put((name, x.flatten(0, -2)))
        if not self.answers.get():
            raise _Abandoned

    def proceed(self) -> Stop | None:
        """The next layer and its input; None when the pass is complete. Errors of the model are raised here."""
        if self.ident is None:
            self.start()
        else:
            self.answers.put(True)
        stop = self.stops.get()
        if isinstance(stop, BaseException):
            raise stop
        return stop

    def abandon(self) -> None:
        self.answers.put(False)
        if self.ident is not None:
            self.join()


@contextmanager
def _passes(model: nn.Module, layers: list[str], batches: list[Tensor]) -> Iterator[list[_Pass]]:
    """Forward passes of `model`, one a batch, that wait at `layers`."""

    def wait(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            this = current_thread()
            assert isinstance(this, _Pass)
            this.wait_at(name, inputs[0])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(wait(name)) for name in layers]
    passes = [_Pass(model, images) for images in batches]
    try:
        yield passes
    finally:
        for one in passes:
            one.abandon()
        for handle in handles:
            handle.remove()
