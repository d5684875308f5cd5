"""Device profiles made by hand: what they answer, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError
from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.profile import DeviceProfile, LayerProfile, SparseProfile

BLOCK, KEPT = (64, 32), [0.1, 0.25, 0.5, 1.0]
MS, MJ = [1.0, 2.5, 4.0, 9.0], [30.0, 75.0, 120.0, 270.0]
NO_METER = "RAPL: absent"


def layer(mj: bool = True, **changes: Any) -> LayerProfile:
    sparse = [
        SparseProfile(block=BLOCK, kept=KEPT, ms=MS, mj=MJ if mj else None),
        SparseProfile(block=(32, 32), kept=KEPT, ms=[2 * ms for ms in MS], mj=[2 * ms for ms in MJ] if mj else None),
    ]
    facts: dict[str, Any] = {"shape": (384, 96), "rows": 17, "bias": True, "names": ["blocks.0.fc1", "blocks.1.fc1"]}
    return LayerProfile(**facts | {"dense_ms": 5.0, "dense_mj": 150.0 if mj else None, "sparse": sparse} | changes)


def profile(mj: bool = True, **changes: Any) -> DeviceProfile:
    facts: dict[str, Any] = {
        "device": "a CPU, 2 threads",
        "dtype": "float32",
        "threads": 2,
        "model": "vit",
        "batch_size": 1,
        "provenance": {"date": "today"},
        "model_ms": 20.0,
        "model_mj": 700.0 if mj else None,
        "model_work": Work(macs=10**9, moved_bytes=10**6),
        "energy_source": "RAPL" if mj else None,
        "energy_reasons": [] if mj else [NO_METER],
        "layers": [layer(mj), layer(mj, names=["head"], rows=1, dense_ms=1.0, dense_mj=20.0 if mj else None)],
    }
    return DeviceProfile(**facts | changes)


def test_between_measured_fractions_it_is_linear_and_beyond_them_constant() -> None:
    kept = torch.tensor([[0.0, 0.1, 0.175], [0.25, 0.4, 0.75]], dtype=torch.float64)
    expected = torch.tensor([[1.0, 1.0, 1.75], [2.5, 3.4, 6.5]], dtype=torch.float64)
    ms, mj = (ask((384, 96), 17, BLOCK, kept) for ask in (profile().linear_ms, profile().linear_mj))
    torch.testing.assert_close(ms, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mj, 30 * expected, rtol=1e-12, atol=0)
    assert ms.dtype == mj.dtype == torch.float64
    twice = profile().linear_ms((384, 96), 17, (32, 32), kept)
    torch.testing.assert_close(twice, 2 * expected, rtol=1e-12, atol=0)


@given(st.floats(0, 1, exclude_max=True))
def test_a_number_lies_on_the_line_between_its_neighbours(kept: float) -> None:
    got = float(profile().linear_ms((384, 96), 17, BLOCK, torch.tensor(kept, dtype=torch.float64)))
    inside = min(max(kept, KEPT[0]), KEPT[-1])
    n = next(n for n in range(len(KEPT) - 1) if inside <= KEPT[n + 1])
    slope = (MS[n + 1] - MS[n]) / (KEPT[n + 1] - KEPT[n])
    assert got == pytest.approx(MS[n] + slope * (inside - KEPT[n]), rel=1e-12)


def test_a_layer_that_keeps_all_stays_dense() -> None:
    kept = torch.tensor([1.0, 1 - 2**-20])  # float32
    assert profile().linear_ms((384, 96), 17, BLOCK, kept).tolist() == [5.0, pytest.approx(9.0, abs=1e-4)]
    assert profile().linear_mj((384, 96), 17, BLOCK, kept).tolist() == [150.0, pytest.approx(270.0, abs=1e-3)]
    assert float(profile().linear_ms((384, 96), 1, BLOCK, torch.tensor(1.0))) == 1.0, "the layer that sees one row"


@pytest.mark.parametrize(
    ("shape", "rows", "block", "told"),
    [
        ((96, 384), 17, BLOCK, "no layer of 96x384 (out x in) on 17 rows with blocks of 64x32"),
        ((384, 96), 34, BLOCK, "no layer of 384x96 (out x in) on 34 rows with blocks of 64x32"),
        ((384, 96), 17, (32, 64), "no layer of 384x96 (out x in) on 17 rows with blocks of 32x64"),
    ],
)
@pytest.mark.parametrize("query", ["linear_ms", "linear_mj"])
def test_what_was_not_measured_is_named(query: str, shape: Any, rows: int, block: Any, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        getattr(profile(), query)(shape, rows, block, torch.tensor([0.5]))
    assert told in caught.value.message
    assert "lpvit profile RECIPE --batch-size N" in caught.value.hint


def test_without_energy_there_is_no_energy_and_its_reason_is_told() -> None:
    without = profile(mj=False)
    assert without.rest_mj is None
    with pytest.raises(UsageError, match=f"has no energy: {NO_METER}"):
        without.linear_mj((384, 96), 17, BLOCK, torch.tensor([0.5]))
    assert float(without.linear_ms((384, 96), 17, BLOCK, torch.tensor(0.5))) == 4.0


def test_the_rest_is_what_the_layers_leave_of_the_model() -> None:
    assert profile().rest_ms == 20 - (2 * 5 + 1)
    assert profile().rest_mj == 700 - (2 * 150 + 20)
    assert (profile(model_ms=3).rest_ms, profile(model_mj=3).rest_mj) == (0, 0), "never negative"


@pytest.mark.parametrize(
    ("dense_ms", "kept"), [(0.5, None), (1.0, 0.1), (2.0, 0.2), (4.0, 0.5), (6.5, 0.75), (9.0, 1.0), (20.0, 1.0)]
)
def test_break_even(dense_ms: float, kept: float | None) -> None:
    assert layer().sparse[0].break_even(dense_ms) == pytest.approx(kept)


def test_break_even_is_the_last_crossing_of_a_noisy_curve() -> None:
    assert SparseProfile(block=BLOCK, kept=KEPT, ms=[1, 6, 4, 8], mj=None).break_even(5) == pytest.approx(0.625)
    assert SparseProfile(block=BLOCK, kept=KEPT, ms=[1, 6, 8, 4], mj=None).break_even(5) == 1


@pytest.mark.parametrize("mj", [True, False])
def test_a_file_comes_back_as_it_was(tmp_path: Path, mj: bool) -> None:
    profile(mj).save(tmp_path / "profile.json")
    assert DeviceProfile.load(tmp_path / "profile.json") == profile(mj)
    content = json.loads((tmp_path / "profile.json").read_text())
    assert (content["format"], content["format_version"]) == ("lpvit-profile", 2)
    assert (content["rest_ms"], content["rest_mj"]) == (9, 380 if mj else None)


def refused(path: Path) -> LpvitError:
    with pytest.raises(LpvitError) as caught:
        DeviceProfile.load(path)
    assert str(path) in caught.value.message
    assert "lpvit profile RECIPE" in caught.value.hint or "profile.json" in caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ('{"format": "lpvit-pro', EnvironmentFault, "damaged: "),
        ("", EnvironmentFault, "damaged: "),
        ("[]", UsageError, "not a device profile"),
        ('{"format": "lpvit-model"}', UsageError, "not a device profile"),
        (
            '{"format": "lpvit-profile", "format_version": 3, "new": 1}',
            EnvironmentFault,
            "format_version 3, this lpvit reads 2",
        ),
        ('{"format": "lpvit-profile", "format_version": 1}', EnvironmentFault, "format_version 1, this lpvit reads 2"),
        ('{"format": "lpvit-profile", "format_version": "2"}', EnvironmentFault, "damaged: format_version: "),
        ('{"format": "lpvit-profile", "format_version": 2}', EnvironmentFault, "damaged: device: Field required"),
    ],
)
def test_files_that_are_no_profile_are_refused(tmp_path: Path, text: str, kind: type, told: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    error = refused(path)
    assert type(error) is kind
    assert told in error.message


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model_ms",), 0),
        (("model_ms",), float("nan")),
        (("model_ms",), "fast"),
        (("layers", 0, "dense_ms"), -1.0),
        (("layers", 0, "names"), []),
        (("layers", 0, "sparse", 0, "ms"), [1.0, 2.0]),
        (("layers", 0, "sparse", 0, "mj"), [1.0]),
        (("layers", 0, "sparse", 0, "ms"), [1.0, 2.0, float("inf"), 3.0]),
        (("layers", 0, "sparse", 0, "kept"), [0.25, 0.1, 0.5, 1.0]),
        (("layers", 0, "sparse", 0, "kept"), [0.1, 0.25, 0.5, 1.5]),
        (("layers", 0, "sparse", 0, "kept"), []),
    ],
)
def test_damaged_numbers_are_refused_by_name(tmp_path: Path, keys: tuple[str | int, ...], value: object) -> None:
    content = json.loads(profile().model_dump_json())
    place: Any = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(content))
    error = refused(path)
    assert isinstance(error, EnvironmentFault)
    named = keys if keys[-1] in ("model_ms", "dense_ms", "names") or value in ([], [0.1, 0.25, 0.5, 1.5]) else keys[:-1]
    assert f"damaged: {'.'.join(str(key) for key in named)}" in error.message


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert isinstance(refused(tmp_path / "absent.json"), UsageError)
    assert isinstance(refused(tmp_path), EnvironmentFault)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert isinstance(refused(tmp_path / "binary.json"), EnvironmentFault)
