"""Devices and types of computing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lpvit_cli.devices import autocast, fast_dtype, pick_device, pick_dtype
from lpvit_cli.errors import EnvironmentFault, UsageError


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:x", "mps", "meta", "xpu:0"])
def test_devices_that_do_not_exist_or_are_not_supported(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}' is not") as caught:
        pick_device(name)
    assert "auto, cpu, cuda" in caught.value.hint


@pytest.mark.parametrize(
    ("count", "refused", "allowed"), [(0, ["cuda", "cuda:0", "cuda:99"], []), (2, ["cuda:2"], ["cuda", "cuda:1"])]
)
def test_gpus_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, count: int, refused: list[str], allowed: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name in refused:
        with pytest.raises(EnvironmentFault, match=f"device '{name}': this machine has {count} usable CUDA devices") as caught:
            pick_device(name)
        assert "lpvit doctor" in caught.value.hint
    for name in allowed:
        assert pick_device(name) == torch.device(name)


def test_no_machine_has_a_hundred_gpus() -> None:
    with pytest.raises(EnvironmentFault, match="'cuda:99'"):
        pick_device("cuda:99")


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device("auto") == torch.device(expected)
    assert pick_device("cpu") == torch.device("cpu")
    for name, value in {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    assert pick_device("auto") == torch.device("cuda:2" if available else "cpu"), "each process has a GPU of its own"
    with pytest.raises(UsageError, match="under torchrun each process has a GPU of its own"):
        pick_device("cuda:0")


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cpu", torch.float32),
        ("float16", "cuda", torch.float16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_compute_types(name: str, device: str, expected: torch.dtype) -> None:
    assert pick_dtype(name, torch.device(device)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_the_type_and_keeps_the_weights(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(torch.device("cpu"), dtype):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_passes_that_gather_sums_are_in_bfloat16_where_the_device_has_it(
    monkeypatch: pytest.MonkeyPatch, device: str, has: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has if device == "cuda" else pytest.fail("asked the GPU"))
    monkeypatch.setattr(
        torch.cpu, "_is_avx512_bf16_supported", lambda: has if device == "cpu" else pytest.fail("asked the CPU")
    )
    assert fast_dtype("auto", torch.device(device)) == (torch.bfloat16 if has else torch.float32)
    assert fast_dtype("float32", torch.device(device)) == torch.float32
    assert fast_dtype("bfloat16", torch.device(device)) == torch.bfloat16
