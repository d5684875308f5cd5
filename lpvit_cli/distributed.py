"""Several processes, one for each device, as torchrun starts them: who this one is, and sums over all of them.

In one process every function here is the identity, and torch is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from lpvit_cli.errors import EnvironmentFault, LpvitError

if TYPE_CHECKING:
    from torch import Tensor

Thing = TypeVar("Thing")
PATIENCE = timedelta(minutes=10)  # how long one process waits for another
LOST = ("gloo", "nccl", "connection closed", "connection reset")  # in the words of torch's other errors


class PeerLost(EnvironmentFault):
    """Another process of the job has ended or does not answer."""


def world() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    return int(os.environ["RANK"]) if world() > 1 else 0


def local_rank() -> int:
    """This process among those of its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that prints and writes."""
    return rank() == 0


@contextmanager
def joined(on_gpus: bool) -> Iterator[None]:
    """Work together with the other processes of this job inside: NCCL between GPUs, gloo between CPUs.

    Raises PeerLost when another one ends or does not answer.
    """
    if world() == 1:
        yield
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=PATIENCE)
        yield
        dist.destroy_process_group()  # not after a failure: it might wait for a process that is gone
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in LOST):
            raise
        raise PeerLost(
            f"process {rank()} of {world()}: another process of this job has ended or does not answer",
            "see its own message; the same command goes on from the last checkpoint, with any number of processes",
        ) from error


def all_reduce(*tensors: Tensor) -> None:
    """Add up each tensor over all processes, in place."""
    if world() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)


def all_gather(things: list[Thing]) -> list[Thing]:
    """What all processes have, one after the other (anything that pickles)."""
    if world() == 1:
        return things
    import torch.distributed as dist

    gathered: list[list[Thing]] = [[] for _ in range(world())]
    dist.all_gather_object(gathered, things)
    return [thing for some in gathered for thing in some]


def broadcast(thing: Thing) -> Thing:
    """What the main process has (anything that pickles); also where the others wait for it."""
    if world() == 1:
        return thing
    import torch.distributed as dist

    things = [thing]
    dist.broadcast_object_list(things, src=0)
    return things[0]


def share(*tensors: Tensor) -> None:
    """Give every process what the main process has in each tensor, in place."""
    if world() > 1:
        import torch.distributed as dist

        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def on_main(work: Callable[[], Thing]) -> Thing:
    """Do this in the main process alone; every process gets the result (anything that pickles), or raises the LpvitError."""
    if world() == 1:
        return work()
    result: list[Thing] = []
    error: LpvitError | None = None
    if is_main():
        try:
            result = [work()]
        except LpvitError as caught:
            error = caught
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result[0]
