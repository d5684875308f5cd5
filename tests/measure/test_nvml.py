"""NVML through the real binding: on a fake library that says it is one, and on a real GPU where there is one."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lpvit_cli.measure.energy.meters import open_meter
from lpvit_cli.measure.energy.run import measure_energy

UUID = "00000000-0000-0000-0000-00000000fa4e"

OPEN = """
import ctypes, json, os, sys
from contextlib import contextmanager
fake = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # the binding then finds it by its SONAME
fake.fake_now.restype = ctypes.c_double
samplers = []
def spend(seconds, watts=60.0):
    while seconds > 1e-12:
        fake.fake_spend(ctypes.c_double(min(0.05, seconds)), ctypes.c_double(watts))
        seconds -= 0.05
        for sample in samplers:
            sample()
@contextmanager
def polling(sample):
    samplers.append(sample)
    yield
    samplers.remove(sample)
from dataclasses import asdict
from lpvit_cli.measure.energy.run import measure_energy
from lpvit_cli.measure.energy.meters import open_meter
from lpvit_cli.measure.energy.meters.base import MeterError
from lpvit_cli.measure.energy.meters.nvml import NvmlMeter
"""
MEASURE = """
def measure(meter, call, **options):
    return measure_energy({"dense": call}, 8, meter, trials=6, window_s=10.0, synchronize=lambda: None,
                          clock=fake.fake_now, sleep=spend, polling=polling)
"""
METERED = f"""
meter = NvmlMeter("{UUID}", allow_fake=True, clock=fake.fake_now, **{{options}})
print(json.dumps(asdict(measure(meter, lambda: spend(0.005, 350.0)))))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc or gcc) to build the fake NVML")
    built = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    flags = ["-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run([compiler, *flags, "-o", str(built), str(source)], check=True)
    return built


def python(code: str, *arguments: str, **environment: str) -> Any:
    """What `code` prints as JSON, run by a Python of its own."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def reasons(library: Path, uuid: str = UUID, **environment: str) -> list[str]:
    """Why `open_meter` gives no meter."""
    code = OPEN + f"meter, reasons = open_meter('cuda', {uuid!r}); print(json.dumps([meter is None, reasons]))"
    none, found = python(code, str(library), **environment)
    assert none
    assert len(found) == 1
    return list(found)


@pytest.mark.parametrize("prefix", ["", "GPU-"])
def test_counter_of_the_board_with_the_uuid(library: Path, prefix: str) -> None:
    code = OPEN + MEASURE + f"meter = NvmlMeter('{prefix}{UUID}', allow_fake=True)\n"
    code += "print(json.dumps(asdict(measure(meter, lambda: spend(0.005, 350.0)))))"
    run = python(code, str(library))
    dense = run["subjects"]["dense"]
    assert run["reasons"] == []
    assert dense["joules_per_image"] == pytest.approx(350 * 0.005 / 8, rel=5e-3)
    assert dense["average_w"] == pytest.approx(350, rel=5e-3)
    assert dense["above_idle_joules_per_image"] == pytest.approx(290 * 0.005 / 8, rel=5e-3)
    assert run["idle_w"] == pytest.approx(60, rel=0.02)


@pytest.mark.parametrize(
    "names", [{}, {"FAKE_NVML_NAME": "Board 1"}, {"FAKE_NVML_DRIVER": "550.1"}], ids=["both", "driver", "name"]
)
def test_a_fake_is_refused(library: Path, names: dict[str, str]) -> None:
    assert any(word in reasons(library, **names)[0] for word in ("fake", "test double"))


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        ("nvmlInit=9", "driver"),
        ("nvmlInit=12", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
        ("nvmlInit=18", "version"),
        ("nvmlInit=999", "code 999"),
        ("nvmlDeviceGetHandleByUUID=15", "lost"),
        ("nvmlDeviceGetName=10", "code 10"),
    ],
)
def test_error_codes_at_the_start_are_reasons(library: Path, fail: str, said: str) -> None:
    assert said.lower() in reasons(library, FAKE_NVML_FAIL=fail)[0].lower()


def test_another_uuid_gets_no_other_board(library: Path) -> None:
    assert "NVML" in reasons(library, uuid="11111111-0000-0000-0000-00000000fa4e")[0]


def metered(library: Path, options: str = "{}", **environment: str) -> Any:
    """What measuring a load of 350 W, 5 ms for 8 images, comes to on the fake board."""
    return python(OPEN + MEASURE + METERED.replace("{options}", options), str(library), **environment)


TRUE_J = 350 * 0.005 / 8
NO_COUNTER = "nvmlDeviceGetTotalEnergyConsumption=3"
NO_POWER = "field186=3 nvmlDeviceGetPowerUsage=3"


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"FAKE_NVML_MIG": "1"}, "MIG"), ({"FAKE_NVML_FAIL": f"{NO_COUNTER} {NO_POWER}"}, "neither an energy counter")],
    ids=["mig", "neither counter nor power"],
)
def test_boards_that_cannot_be_metered_say_why(library: Path, environment: dict[str, str], said: str) -> None:
    assert said in reasons(library, FAKE_NVML_NAME="Board", FAKE_NVML_DRIVER="550.1", **environment)[0]


def test_a_board_split_by_mig_is_measured_on_request_and_the_report_says_what_that_means(library: Path) -> None:
    run = metered(library, "{'allow_mig': True}", FAKE_NVML_MIG="1")
    assert run["subjects"]["dense"]["joules_per_image"] == pytest.approx(TRUE_J, rel=5e-3)
    assert "split by MIG" in run["notes"][0]


@pytest.mark.parametrize(
    ("fail", "power_source"), [("", "NVML_FI_DEV_POWER_INSTANT"), ("field186=3", "nvmlDeviceGetPowerUsage")]
)
def test_without_a_counter_power_is_added_up_and_labelled(library: Path, fail: str, power_source: str) -> None:
    run = metered(library, FAKE_NVML_FAIL=f"{NO_COUNTER} {fail}")
    dense = run["subjects"]["dense"]
    assert dense["joules_per_image"] == pytest.approx(TRUE_J, rel=5e-3)
    assert run["source"].startswith(f"power-integration ({power_source})")
    assert (dense["trace_joules_per_image"], dense["agreement"]) == (None, None), "it would be checked against itself"
    assert any("no energy counter" in note for note in run["notes"])
    assert any("average over a second" in note for note in run["notes"]) == bool(fail)


@pytest.mark.parametrize(("gain", "agreement"), [("1.0", "good"), ("1.06", "fair"), ("1.2", "inconsistent")])
def test_the_counter_is_checked_against_the_power_trace(library: Path, gain: str, agreement: str) -> None:
    run = metered(library, FAKE_NVML_GAIN=gain)
    dense = run["subjects"]["dense"]
    assert dense["agreement"] == agreement
    assert dense["joules_per_image"] == pytest.approx(TRUE_J, rel=5e-3)
    assert dense["trace_joules_per_image"] == pytest.approx(float(gain) * TRUE_J, rel=0.01)
    assert dense["peak_w"] == pytest.approx(350 * float(gain), rel=1e-3)
    assert any("inconsistent" in note for note in run["notes"]) == (agreement == "inconsistent")
    assert all(window["power_capped"] for window in dense["windows"]), "the fake is at its cap under load"
    assert any("at the power limit in 6 of 6 windows" in note for note in run["notes"])


def test_the_board_and_how_it_is_set_are_recorded(library: Path) -> None:
    run = metered(library, FAKE_NVML_PROCESSES="3")
    facts = {"name": "FAKE GPU", "driver": "000.00 FAKE", "nvml": "0.000.00", "power_limit_w": 700.0, "clock_mhz": 1500}
    facts |= {"clock_max_mhz": 1980, "memory_clock_mhz": 2600, "memory_clock_max_mhz": 2600, "temperature_c": 40}
    assert run["device"] == {**facts, "processes": 3}
    assert any("2 other processes" in note for note in run["notes"])


def test_a_board_without_mig_event_reasons_or_sensors_still_counts(library: Path) -> None:
    fail = f"nvmlDeviceGetMigMode=3 nvmlDeviceGetCurrentClocksEventReasons=13 nvmlDeviceGetClockInfo=3 {NO_POWER}"
    run = metered(library, FAKE_NVML_FAIL=fail)
    assert run["subjects"]["dense"]["joules_per_image"] == pytest.approx(TRUE_J, rel=5e-3)
    assert run["power_source"] is None
    assert run["subjects"]["dense"]["trace"] is None
    assert any("hot windows were not left out" in note for note in run["notes"])


def test_only_heat_and_brakes_count_as_slowed_down(library: Path) -> None:
    """Bits of nvmlClocksEventReasons in nvml.h; a power cap, user clocks or an idle board are how it is meant to run."""
    code = OPEN + f"meter = NvmlMeter({UUID!r}, allow_fake=True)\n"
    code += """
def slowed(bit):
    os.environ["FAKE_NVML_CLOCKS"] = str(bit)
    return meter.read().slowed_down
print(json.dumps([1 << n for n in range(9) if slowed(1 << n)]))
"""
    assert python(code, str(library)) == [0x8, 0x20, 0x40, 0x80]


@pytest.mark.parametrize(("code", "said"), [(15, "lost"), (16, "reset"), (10, "code 10"), (999, "code 999")])
def test_a_board_that_dies_midway_leaves_its_code_and_no_number(library: Path, code: int, said: str) -> None:
    script = OPEN + MEASURE + f"meter = NvmlMeter({UUID!r}, allow_fake=True)\n"
    script += f"""
def call():
    spend(0.005, 350.0)
    if fake.fake_now() > 60:
        os.environ["FAKE_NVML_FAIL"] = "nvmlDeviceGetTotalEnergyConsumption={code}"
print(json.dumps(asdict(measure(meter, call))))
"""
    run = python(script, str(library))
    assert all(subject["joules_per_image"] is None for subject in run["subjects"].values())
    assert len(run["reasons"]) == 1
    assert said in run["reasons"][0]


def test_a_machine_without_the_library_says_so() -> None:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has NVML")
    meter, found = open_meter("cuda", "")
    assert meter is None
    assert found[0].startswith("NVML library not found (no NVIDIA driver here)")
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in open_meter("cuda", UUID)[1][0]


@pytest.mark.gpu
def test_energy_rises_under_load_on_a_real_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch sees no CUDA device")
    import pynvml

    uuid = str(torch.cuda.get_device_properties(0).uuid)
    meter, why = open_meter("cuda", uuid)
    if meter is None:
        pytest.skip(f"needs a readable energy counter: {'; '.join(why)}")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    run = measure_energy({"matmul": lambda: a @ a}, 1, meter, trials=6, window_s=2.0, synchronize=torch.cuda.synchronize)
    assert run.reasons == []
    limit_w = pynvml.nvmlDeviceGetEnforcedPowerLimit(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")) / 1000
    watts = run.subjects["matmul"].average_w
    assert run.idle_w is not None
    assert watts is not None
    assert 1.2 * run.idle_w < watts < 1.05 * limit_w  # the limit is held on average, by a control loop
