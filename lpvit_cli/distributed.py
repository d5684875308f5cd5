"""Several processes, one for each device, as torchrun starts them: who this one is, and sums over all of them.

In one process every function here is the identity, and torch is not imported.
"""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Thing = TypeVar("Thing")
PATIENCE = "LPVIT_PATIENCE"  # in the environment
LONGEST_STEP = timedelta(minutes=10)  # that one process works alone while others wait for it
TORCHRUN = -1  # in the place of a rank
DONE, FAILED, LEFT = "done", "failed", "left"  # last words of a process; left: because of another one
AGAIN = "the same command goes on from the last checkpoint, with any number of processes"
LOST = ("gloo", "nccl", "connection closed", "connection reset")  # in the words of torch's other errors


class PeerLost(EnvironmentFault):
    """Another process of the job has ended or does not answer. `rank`: which, or TORCHRUN, if that is known."""

    def __init__(self, message: str, hint: str, rank: int | None = None):
        super().__init__(message, hint)
        self.rank = rank


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
def joined(on_gpus: bool, give_up: Callable[[PeerLost], None]) -> Iterator[None]:
    """Work together with the other processes of this job inside: NCCL between GPUs, gloo between CPUs.

    Raises PeerLost when another one ends. `give_up` is called, by another thread, when one is stopped: this one may wait for it
    in a call that nothing interrupts, so `give_up` ends the process.
    """
    if world() == 1:
        yield
        return
    import torch.distributed as dist

    watch, default = None, signal.signal(signal.SIGTERM, _told_to_end)
    try:
        store, *_ = next(dist.rendezvous("env://", rank(), world(), timeout=LONGEST_STEP))
        watch = Watch(store, patience(), give_up)
        backends = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
        dist.init_process_group(backends, store=store, rank=rank(), world_size=world(), timeout=LONGEST_STEP)
        watch.start()
        yield
        watch.end(DONE)
        dist.destroy_process_group()  # not after a failure: it might wait for a process that is gone
        signal.signal(signal.SIGTERM, default)
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is wrong is still to be told: Console.command listens again
        ended = isinstance(error, dist.DistError | _ToldToEnd)
        torn = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
        lost = _lost(watch) if ended or torn else None
        if watch:
            watch.end(LEFT if lost else FAILED)
        if lost is None:
            raise
        raise lost from error


def _lost(watch: Watch | None) -> PeerLost:
    ended = watch.who_ended() if watch else None
    what = f"{ended} has ended" if ended else "another process of this job has ended, or all were told to"
    return PeerLost(f"process {rank()} of {world()}: {what}", f"see its own message; {AGAIN}", ended.rank if ended else None)


def patience(otherwise: float = 60) -> float:
    """Seconds that another process may say nothing: $LPVIT_PATIENCE, or `otherwise`."""
    given = os.environ.get(PATIENCE) or f"{otherwise}"
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{PATIENCE}={given}: not a number of seconds", f"for example: {PATIENCE}=60")
    return seconds


def speaks(lost: PeerLost) -> bool:
    """Whether this process tells of the loss, of those that are left."""
    others = {0: 1, TORCHRUN: world() - 1}  # the last: what is lost may be the machine of torchrun and the first
    return rank() == (0 if lost.rank is None else others.get(lost.rank, 0))


class _ToldToEnd(BaseException):
    """SIGTERM, which torchrun sends to all when one process has ended."""


def _told_to_end(*_: object) -> None:
    raise _ToldToEnd


@dataclass(frozen=True)
class Peer:
    """Another process: the last that it said, where it runs, and since when it says nothing else; or TORCHRUN."""

    rank: int
    word: str = ""
    place: str = ""
    since: float = 0.0

    def __str__(self) -> str:
        return "torchrun, which keeps the job together," if self.rank == TORCHRUN else f"process {self.rank}{self.place}"


class Watch:
    """Says every few seconds that this process lives, and hears it of the others.

    A process that computes or waits still says so; one that is stopped, or whose machine is gone, does not. torchrun keeps what
    is said, or the first process where others have started the job: where the keeper is stopped, saying and hearing wait for
    ever, so that another thread looks at the clock.
    """

    def __init__(self, store: Any, patience: float, give_up: Callable[[PeerLost], None]):
        self._store, self._patience, self._give_up = store.clone(), patience, give_up
        self._beat, self._over = min(2.0, patience / 4), threading.Event()
        self._heard: dict[int, Peer] = {}  # by rank
        self._answered = time.monotonic()  # when all were last asked
        self._say("0")

    def start(self) -> None:
        for work in (self._talk, self._look_at_the_clock):
            threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()

    def _talk(self) -> None:
        count = 0
        while not self._over.wait(self._beat):
            count += 1
            try:
                self._say(str(count))
                self._hear()
            except RuntimeError:  # of the store: its keeper has ended; if that was a process, this one finds out itself
                self._over.set()

    def _look_at_the_clock(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._beat):
            now = time.monotonic()
            if now - before > 4 * self._beat:  # this process was stopped itself
                self._answered = now
                self._heard.clear()
            before = now
            silent = self._silent(self._patience)
            if silent is None and now - self._answered > self._patience:
                silent = self._keeper()
            if silent:
                self._give_up(self._stopped(silent))
                return

    def end(self, word: str) -> None:
        """Say something for the last time."""
        self._over.set()
        with suppress(RuntimeError):
            self._say(word)

    def who_ended(self) -> Peer | None:
        """The process that failed or is silent, looked for during four beats."""
        until = time.monotonic() + 4 * self._beat
        while time.monotonic() < until:
            time.sleep(self._beat / 2)
            try:
                self._hear()
            except RuntimeError:  # of the store
                keeper = self._keeper()
                return None if keeper.rank == rank() else keeper
            failed = next((peer for peer in list(self._heard.values()) if peer.word == FAILED), None)
            if ended := failed or self._silent(2.5 * self._beat):
                return ended
        return None

    def _keeper(self) -> Peer:
        """Who keeps what is said."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return Peer(TORCHRUN)
        return self._heard.get(0, Peer(0))

    def _say(self, word: str) -> None:
        self._store.set(f"lpvit/{rank()}", f"{word} {os.getpid()} {platform.node()}")

    def _hear(self) -> None:
        for other in {*range(world())} - {rank()}:
            word, pid, host = self._store.get(f"lpvit/{other}").decode().split(" ", 2)
            if other not in self._heard or self._heard[other].word != word:
                self._heard[other] = Peer(other, word, f" (pid {pid} on {host})", time.monotonic())
        self._answered = time.monotonic()

    def _silent(self, seconds: float) -> Peer | None:
        """Who has said nothing new for longest, if that is longer than so many seconds."""
        waited_for = [peer for peer in list(self._heard.values()) if peer.word not in (DONE, LEFT)]
        longest = min(waited_for, key=lambda peer: peer.since, default=None)
        return longest if longest and self._answered - longest.since > seconds else None

    def _stopped(self, peer: Peer) -> PeerLost:
        return PeerLost(
            f"process {rank()} of {world()}: {peer} has not answered for {self._patience:g} s:"
            " it is stopped, or its machine is lost",
            f"end it (kill -9 PID), then start the job again: {AGAIN}; to wait longer: {PATIENCE}=SECONDS",
            peer.rank,
        )


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
