"""Budgets in milliseconds and millijoules, by device profiles made by hand: what is promised, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Result, copy_run, run_cli
from stages.plans import plan_of, quiet

from lpvit_cli.errors import UsageError
from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.profile import DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.pruning.engine import prune_model
from lpvit_cli.pruning.plan import Allocation, Plan
from lpvit_cli.recipe.prune import Budget
from lpvit_cli.sparse import sparse_layers

KEPT = [0.05, 0.25, 0.5, 0.75, 0.9, 1.0]
TIMES = [0.3, 0.5, 0.65, 0.9, 1.3, 1.6]  # of the dense layer: sparse is slower down to four fifths
REST = 10.0
NO_METER = "RAPL: /sys/class/powercap is not readable"
Shapes = dict[tuple[int, int], list[str]]
VIT_LAYERS: Shapes = {
    (96, 32): ["blocks.0.attn.qkv", "blocks.1.attn.qkv"],
    (32, 32): ["blocks.0.attn.proj", "blocks.1.attn.proj"],
    (128, 32): ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
    (32, 128): ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"],
}


def dense_ms(shape: tuple[int, int]) -> float:
    return shape[0] * shape[1] / 1000


def profile(
    layers: Shapes = VIT_LAYERS,
    blocks: tuple[tuple[int, int], ...] = ((16, 8),),
    batch: int = 1,
    mj: bool = False,
    times: list[float] = TIMES,
) -> DeviceProfile:
    """A layer takes a microsecond a weight, and 7 mJ a millisecond; what is not a layer, REST ms."""

    def layer(shape: tuple[int, int], names: list[str]) -> LayerProfile:
        dense = dense_ms(shape)
        sparse = [
            SparseProfile(
                block=block, kept=KEPT, ms=[dense * t for t in times], mj=[7 * dense * t for t in times] if mj else None
            )
            for block in blocks
        ]
        facts: dict[str, Any] = {"shape": shape, "rows": 17 * batch, "bias": True, "names": names, "sparse": sparse}
        return LayerProfile(dense_ms=dense, dense_mj=7 * dense if mj else None, **facts)

    model = REST + sum(len(names) * dense_ms(shape) for shape, names in layers.items())
    return DeviceProfile(
        device="a made-up device",
        dtype="float32",
        threads=1,
        model="vit_tiny_patch16_224",
        batch_size=batch,
        provenance={},
        model_ms=model,
        model_mj=7 * model if mj else None,
        model_work=Work(macs=10**6, moved_bytes=10**5),
        energy_source="made up" if mj else None,
        energy_reasons=[] if mj else [NO_METER],
        layers=[layer(shape, names) for shape, names in layers.items()],
    )


def milliseconds(plan: Plan, pruned: Allocation, less: str | None = None) -> float:
    """Of a batch, from the numbers above; with one removal less of one layer."""
    total = REST
    for name, choice in pruned.points.items():
        removed = choice.removed - (name == less)
        mask = pruned.option(name).removal.mask(removed)
        fraction = float(mask.double().mean())
        factor = 1.0 if fraction == 1 else float(np.interp(fraction, KEPT, TIMES))
        total += dense_ms(tuple(plan.layers[name].weight.shape)) * factor  # type: ignore[arg-type]
    return total


DENSE = REST + 2 * (96 * 32 + 32 * 32 + 128 * 32 + 32 * 128) / 1000


# plans


@pytest.mark.parametrize("saved", [0.5, 2, 5, 8, 12, 16])
@pytest.mark.parametrize("batch", [1, 4])
def test_latency_is_met_and_one_removal_less_would_exceed_it(saved: float, batch: int) -> None:
    plan = plan_of("vit", f"prune.budget.latency_ms={DENSE - saved}", profile=profile(batch=batch))
    pruned = plan.allocation(plan.settings.budget)
    predicted = plan.predict(pruned).latency_ms
    assert predicted == pytest.approx(milliseconds(plan, pruned))
    assert predicted is not None
    assert predicted <= DENSE - saved
    assert any(milliseconds(plan, pruned, less=name) > DENSE - saved for name, c in pruned.points.items() if c.removed)


@pytest.mark.parametrize("budget", [11.3, 12, 13, 14, 14.09])
def test_a_single_layer_loses_as_few_blocks_as_meet_the_latency(budget: float) -> None:
    """32 blocks. As nn.Linear it takes 4.096 ms; the first removals only make it slower, so they are not made."""
    shapes: Shapes = {(128, 32): ["blocks.0.mlp.fc1"]}
    plan = plan_of("vit", "prune.layers.include=[blocks.0.mlp.fc1]", "prune.min_keep=0", profile=profile(shapes))
    time = [dense_ms((128, 32)) * (1.0 if k == 0 else float(np.interp(1 - k / 32, KEPT, TIMES))) for k in range(33)]
    if budget < REST + min(time):
        with pytest.raises(
            UsageError, match=rf"latency_ms {budget:g} cannot be reached: .* from {REST + min(time):.4g} to 14.1"
        ):
            plan.allocation(Budget(latency_ms=budget))
        return
    (choice,) = plan.allocation(Budget(latency_ms=budget)).points.values()
    assert choice.removed == next(k for k in range(33) if REST + time[k] <= budget)
    assert choice.removed >= 7, "of 32, until removing pays"


def test_a_budget_that_the_dense_model_meets_removes_nothing() -> None:
    plan = plan_of("vit", profile=profile())
    pruned = plan.allocation(Budget(latency_ms=DENSE + 5))
    assert not any(choice.removed for choice in pruned.points.values())
    assert plan.predict(pruned).latency_ms == pytest.approx(DENSE)


def test_latency_that_cannot_be_reached_is_told_with_the_interval() -> None:
    plan = plan_of("vit", "prune.min_keep=0.25", profile=profile())
    fastest = REST + 0.5 * (DENSE - REST)
    told = rf"latency_ms 12 cannot be reached: with min_keep 0.25 it can be from {fastest:.4g} to {DENSE:.4g}$"
    with pytest.raises(UsageError, match=told):
        plan.allocation(Budget(latency_ms=12))
    pruned = plan.allocation(Budget(latency_ms=fastest))
    assert milliseconds(plan, pruned) == pytest.approx(fastest)
    with pytest.raises(UsageError, match="latency_ms 5 cannot be reached"):  # less than what is not pruned at all
        plan.allocation(Budget(latency_ms=5))


@pytest.mark.parametrize("budget", [21, 22, 23, 28])
def test_sequential_pruning_keeps_the_blocks_that_latency_counts(budget: float) -> None:
    """Ragged blocks, of which others are kept than planned; but as many, and so the predicted latency holds."""
    facts = ("prune.block=[24,12]", f"prune.budget.latency_ms={budget}", "prune.min_keep=0.1")
    plan = plan_of("vit", *facts, profile=profile(blocks=((24, 12),)))
    model, pruned = prune_model(plan, plan.settings.budget, quiet)
    assert milliseconds(plan, pruned) <= budget
    kept = {name: len(layer.cols) for name, layer in sparse_layers(model).items()}
    for name, choice in pruned.points.items():
        assert kept[name] == (pruned.option(name).removal.steps - choice.removed if choice.removed else 1)


def test_of_several_shapes_the_fast_one_is_taken() -> None:
    made = profile(blocks=((16, 8), (8, 8)))
    slow = [
        layer.model_copy(update={"sparse": [layer.sparse[0], layer.sparse[1].model_copy(update={"ms": [9.0] * len(KEPT)})]})
        for layer in made.layers
    ]
    plan = plan_of("vit", "prune.block=[[8,8],[16,8]]", profile=made.model_copy(update={"layers": slow}))
    pruned = plan.allocation(Budget(latency_ms=DENSE - 10))
    taken = {pruned.option(name).block for name, choice in pruned.points.items() if choice.removed}
    assert taken == {(16, 8)}


@pytest.mark.parametrize("batch", [1, 4])
def test_energy_is_of_an_image_and_a_profile_of_a_batch(batch: int) -> None:
    budget = 7 * (DENSE - 6) / batch
    plan = plan_of("vit", profile=profile(batch=batch, mj=True))
    pruned = plan.allocation(Budget(energy_mj=budget))
    assert 7 * milliseconds(plan, pruned) / batch <= budget
    less = [7 * milliseconds(plan, pruned, less=name) / batch for name, c in pruned.points.items() if c.removed]
    assert max(less) > budget
    same = plan.allocation(Budget(latency_ms=DENSE - 6))
    assert pruned.points == same.points, "energy is proportional to time on this device"
    with pytest.raises(UsageError, match=rf"energy_mj 1 cannot be reached: .* to {7 * DENSE / batch:.4g}$"):
        plan.allocation(Budget(energy_mj=1))


# profiles of something else


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (profile(blocks=((16, 16),)), r"no layer of 96x32 \(out x in\) on 17 rows with blocks of 16x8"),
        (profile({**VIT_LAYERS, (96, 32): ["blocks.0.attn.qkv"]}), "other layers: blocks.1.attn.qkv is only here"),
        (profile({**VIT_LAYERS, (8, 8): ["blocks.2.attn.proj"]}), "other layers: blocks.2.attn.proj is only there"),
    ],
    ids=["blocks", "fewer layers", "a deeper model"],
)
def test_a_profile_of_other_layers_is_refused(made: DeviceProfile, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        plan_of("vit", profile=made).allocation(Budget(latency_ms=DENSE - 3))
    assert "lpvit profile RECIPE" in caught.value.hint


# the command


SMALL = [
    "model.weights=null",
    "model.kwargs={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 4, num_classes: 10}",
    "data.dataset=synthetic",
    "calibrate.images=32",
    "calibrate.batch_size=16",
    "prune.block=[16,8]",
    "prune.reweigh=1",
    "profile.rounds=6",
    "bench.energy.window_seconds=0.1",
    "device=cpu",
]
Prune = Callable[..., Result]


def command(folder: Path, what: str, *changes: str) -> Result:
    options = [option for change in (*SMALL, *changes) for option in ("--set", change)]
    return run_cli(what, "digits_vit", "-o", folder, *options, "--json")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device") / "run"
    assert command(folder, "calibrate").code == 0
    return folder


@pytest.fixture
def folder(calibrated: Path, tmp_path: Path) -> Path:
    return copy_run(calibrated, tmp_path / "run", "recipe.yaml", "calibration")


def message(result: Result) -> str:
    return str(json.loads(result.out)["error"]["message"])


def test_a_pruned_model_reports_its_predicted_latency(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    result = command(folder, "prune", f"prune.profile={path}", "prune.budget.latency_ms=25")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["latency_ms_dense"] == pytest.approx(DENSE)
    expected = REST
    for layer in report["layers"]:
        fraction = layer["kept_blocks"] / layer["blocks"]
        expected += dense_ms(tuple(layer["shape"])) * (1 if fraction == 1 else float(np.interp(fraction, KEPT, TIMES)))
    assert report["latency_ms"] == pytest.approx(expected)
    assert 24 < expected <= 25


def test_pruning_is_redone_when_the_profile_says_something_else(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    changes = (f"prune.profile={path}", "prune.budget.latency_ms=25")
    profile().save(path)
    first = command(folder, "prune", *changes)
    assert first.code == 0, first.err
    assert "up to date" in command(folder, "prune", *changes).err
    profile(times=[1.2 * t for t in TIMES]).save(path)
    again = command(folder, "prune", *changes)
    assert again.code == 0, again.err
    assert "again (prune.profile (content): " in again.err
    kept = [sum(layer["kept_blocks"] for layer in json.loads(result.out)["layers"]) for result in (first, again)]
    assert kept[1] < kept[0], "slower blocks: more have to go"


def test_an_energy_budget_without_energy_gives_the_reason(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    result = command(folder, "prune", f"prune.profile={path}", "prune.budget.energy_mj=30")
    assert result.code == 2
    assert NO_METER in message(result)
    assert "energy_mj" in message(result)
    profile(mj=True).save(path)
    result = command(folder, "prune", f"prune.profile={path}", f"prune.budget.energy_mj={7 * 25}")
    assert result.code == 0, result.err
    assert json.loads(result.out)["latency_ms"] <= 25


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ("prune.profile=absent.json", 2, "absent.json: no such device profile"),
        ("prune.block=[8,8]", 2, "with blocks of 8x8"),
        ("prune.budget.latency_ms=3", 2, r"prune.budget: latency_ms 3 cannot be reached: with min_keep 0 it can be from"),
        ("prune.patterns=[neurons]", 2, "a profile has no smaller layers"),
        ("prune.patterns=[heads]", 2, "a profile has no smaller layers"),
    ],
)
def test_what_does_not_go_with_a_latency_budget(folder: Path, tmp_path: Path, change: str, code: int, told: str) -> None:
    profile().save(tmp_path / "profile.json")
    result = command(folder, "prune", f"prune.profile={tmp_path}/profile.json", "prune.budget.latency_ms=25", change)
    assert result.code == code
    assert told in message(result)
    assert not (folder / "pruned").exists()


def test_a_run_makes_the_profile_that_its_budget_needs(folder: Path) -> None:
    """Of its own device; generous, since it is measured. Later stages hang on it: a new profile is a new model."""
    dense = [
        "prune.budget.latency_ms=1e6",
        "finetune=null",
        "bench.batch_sizes=[1]",
        "bench.rounds=6",
        "bench.warmup_seconds=0",
    ]
    refused = command(folder, "prune", *dense)
    assert refused.code == 2
    assert "nothing from `profile` there yet" in message(refused)
    result = command(folder, "run", *dense)
    assert result.code == 0, result.err
    reports = json.loads(result.out)
    assert list(reports) == ["profile", "calibrate", "prune", "bench", "export"]
    measured = DeviceProfile.load(folder / "profile" / "profile.json")
    assert reports["prune"]["latency_ms_dense"] == measured.model_ms
    assert {block.block for layer in measured.layers for block in layer.sparse} == {(16, 8)}
    again = command(folder, "run", *dense)
    assert again.err.count("up to date, skipped") == 5
    assert command(folder, "profile", *dense, "profile.rounds=7").code == 0
    stale = command(folder, "prune", *dense)
    assert stale.code == 2
    assert "profile was made with other settings (profile.rounds: 7 -> 6)" in message(stale)
    other = command(folder, "prune", *dense, "profile.rounds=7")
    assert other.code == 0
    assert "prune again (prune.profile (content): " in other.err


def test_a_dry_run_tells_that_the_profile_comes_first(folder: Path) -> None:
    def planned(*changes: str) -> dict[str, Any]:
        options = [option for change in (*SMALL, *changes) for option in ("--set", change)]
        result = run_cli("run", "digits_vit", "-o", folder, *options, "--dry-run", "--json")
        assert result.code == 0, result.err
        return dict(json.loads(result.out))

    latency = "prune.budget.latency_ms=1e6"
    first = planned(latency)
    assert list(first["stages"])[:3] == ["profile", "calibrate", "prune"]
    assert first["stages"]["profile"] == first["stages"]["prune"] == "runs"
    assert first["prediction"]["points"] == []
    assert any("lpvit profile digits_vit" in reason for reason in first["prediction"]["reasons"])
    assert command(folder, "prune").code == 0
    assert planned(latency)["stages"]["prune"].startswith("runs again (")
    for stage in ("profile", "prune"):
        assert command(folder, stage, latency).code == 0
    ready = planned(latency)
    assert ready["stages"]["prune"] == "up to date"
    assert ready["prediction"]["points"][0]["latency_ms"] == ready["prediction"]["latency_ms_dense"]
    assert planned(latency, "target.threads=7")["stages"]["prune"] == "runs again (profile: target.threads: None -> 7)"
