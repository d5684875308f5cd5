"""Timing every backend on a layer, dense included, on the device at hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from lpvit_kernels import backends, cpu, dispatch, tuned
from lpvit_kernels.dispatch import KINDS, Kind
from lpvit_kernels.matrix import BlockSparseMatrix
from lpvit_kernels.tuned import Choice, Tuned

ROUNDS = 9
LEAST_SECONDS = 1e-3  # of one timing: faster calls are repeated


def tune(weight: BlockSparseMatrix, tokens: int, kinds: tuple[Kind, ...] = KINDS) -> dict[Kind, Tuned]:
    """Time all candidates for this layer and number of tokens, in the type and on the device of the values; keep the best.

    Candidates are timed in turns, so that a disturbance meets all of them. Later calls of `linear` on such a layer with about
    as many tokens and backend "auto" take the fastest; so do later processes (tuned.py).

    Raises ValueError for kinds that are none, and without tokens.
    """
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, got {kinds!r}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    weight = weight.with_values(weight.values.detach().clone())  # copies made for slower forms go with these values
    found = {kind: _tune(kind, weight, tokens) for kind in kinds}
    x = weight.values.new_empty(tokens, 1)
    tuned.record({dispatch.case(kind, x, weight).key: entry for kind, entry in found.items()})
    return found


def candidates(kind: Kind, weight: BlockSparseMatrix, tokens: int) -> list[Choice]:
    """All that can compute it on the device of the values."""
    device, dtype = weight.values.device, weight.values.dtype
    choices = [Choice("gathered" if kind == "weight_gradient" else "dense")]
    if device.type == "cpu":
        forms = cpu.GRADIENTS if kind == "weight_gradient" else cpu.FORMS
        few, case = tokens <= 4 * dispatch.FEW_TOKENS, dispatch.case(kind, weight.values.new_empty(tokens, 0), weight)
        timed = [form for form in forms if (form != "batched" or few) and dispatch.serves(form, case)]
        return list(dict.fromkeys([*choices, *(Choice(form) for form in timed)]))
    if dispatch.triton_runs(str(device), str(dtype).removeprefix("torch."), weight.block):
        from lpvit_kernels.gpu import configs

        capability = torch.cuda.get_device_capability(device)
        tiled = configs.candidates(kind, dtype, weight.block, tokens, capability, configs.precision(dtype))
        choices += [Choice("triton", config) for config in tiled]
    return choices


def _tune(kind: Kind, weight: BlockSparseMatrix, tokens: int) -> Tuned:
    device, dtype = weight.values.device, weight.values.dtype
    random = torch.Generator(device).manual_seed(0)  # its own: tuning changes no random numbers of others
    x, dz = (torch.randn(tokens, n, device=device, generator=random).to(dtype) for n in reversed(weight.shape))
    bias = x.new_zeros(weight.shape[0])

    def call(choice: Choice) -> Callable[[], object]:
        if kind == "forward":
            return lambda: backends.forward(x, weight, bias, None, None, None, False, choice)
        if kind == "input_gradient":
            return lambda: backends.input_gradient(dz, weight, choice)
        return lambda: backends.weight_gradient(dz, x, weight, choice)

    calls = {choice: call(choice) for choice in candidates(kind, weight, tokens)}
    with torch.no_grad():
        times = times_in_turns(calls, x)
    best: dict[str, float] = {}
    for choice, seconds in times.items():
        best[choice.backend] = min(best.get(choice.backend, seconds * 1e6), seconds * 1e6)
    return Tuned(min(times, key=lambda choice: times[choice]), best)


def times_in_turns(calls: dict[Choice, Callable[[], object]], x: Tensor) -> dict[Choice, float]:
    """Median seconds of each call. A candidate that the GPU has no room for drops out."""
    repeats, working = {}, {}
    for choice, call in calls.items():
        try:
            call()
            repeats[choice] = max(1, round(LEAST_SECONDS / _seconds(call, 1, x)))
            working[choice] = call
        except (RuntimeError, ValueError) as error:  # triton: OutOfResources is a ValueError or RuntimeError by version
            if x.device.type == "cpu" or "out of" not in str(error).lower():
                raise
    times: dict[Choice, list[float]] = {choice: [] for choice in working}
    for _ in range(ROUNDS):
        for choice, call in working.items():
            times[choice].append(_seconds(call, repeats[choice], x))
    return {choice: median(found) for choice, found in times.items()}


def _seconds(call: Callable[[], object], repeats: int, x: Tensor) -> float:
    """Of one call, on the clock of its device."""
    if x.device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    end_event.synchronize()
    return float(start_event.elapsed_time(end_event)) * 1e-3 / repeats
