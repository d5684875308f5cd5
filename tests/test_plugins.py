"""What another package adds, a method, a budget, a format and a meter, works from the recipe to the report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Demo, run_cli
from torch import Tensor

from lpvit_cli import Recipe, load_model, registry
from lpvit_cli.errors import EnvironmentFault, UsageError
from lpvit_cli.export.formats.base import Format
from lpvit_cli.export.opening import readers
from lpvit_cli.export.results import ExportedFile
from lpvit_cli.measure.energy.meters import open_meter
from lpvit_cli.measure.energy.meters.base import Meter, MeterError, Reading
from lpvit_cli.pruning.blocks import Block, grid
from lpvit_cli.pruning.budgets.base import BudgetKind
from lpvit_cli.pruning.methods.base import Method
from lpvit_cli.pruning.removal import Removal, additive
from lpvit_cli.registry import BUDGETS, FORMATS, METERS, METHODS, Registry
from lpvit_cli.sparse import sparse_layers


class FarColumnsFirst(Method):
    """Blocks go from right to left."""

    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        rows, cols = grid(self.plan.layers[layer].weight.shape, block)  # type: ignore[arg-type]
        return additive(torch.arange(cols, 0, -1, dtype=torch.float64).expand(rows, -1))

    def notes(self) -> list[str]:
        return ["far columns went first"]


class Broken(Method):
    def removal(self, layer: str, block: Block, balanced: bool) -> Removal:
        raise ZeroDivisionError("no blocks today")


class Blocks(BudgetKind):
    """The kept fraction of all blocks."""

    above, most = 0.0, 1.0

    @classmethod
    def along(cls, plan: Any, layer: str, option: Any) -> Tensor:
        kept: Tensor = option.removal.along(cls.of_blocks(option))
        return kept

    @classmethod
    def of_blocks(cls, option: Any) -> Tensor:
        ones: Tensor = torch.ones(option.removal.grid, dtype=torch.float64)
        return ones

    @classmethod
    def rest(cls, plan: Any) -> float:
        return 0.0

    @classmethod
    def unit(cls, plan: Any) -> float:
        return float(sum(group.options[0].removal.order.numel() for group in plan.groups.values()))


class Listing(Format):
    """The names of all tensors, a line each."""

    precisions = ("float32",)

    def write(self, source: Any, work: Path, progress: Any) -> ExportedFile:
        text = "\n".join(source.model.state_dict())
        (work / "tensors.txt").write_text(text)
        return ExportedFile(format="listing", file="tensors.txt", bytes=len(text))


class Steady(Meter):
    """100 W, whatever happens; it ticks every five milliseconds."""

    devices = ("cpu",)
    source = "a steady meter"

    @classmethod
    def open(cls, uuid: str, allow_mig: bool) -> Steady:
        return cls()

    def read(self) -> Reading:
        return Reading(energy_mj=500 * (time.monotonic() // 0.005))


ADDED: list[tuple[Registry, str, Any]] = [
    (METHODS, "far", FarColumnsFirst),
    (METHODS, "broken", Broken),
    (BUDGETS, "blocks", Blocks),
    (FORMATS, "listing", Listing),
    (METERS, "steady", Steady),
]


@pytest.fixture
def added() -> Iterator[None]:
    for where, name, thing in ADDED:
        where.register(name, thing)
    yield
    for where, name, _ in ADDED:
        where.unregister(name)


def command(demo: Demo, what: str, folder: Path, *changes: str) -> Any:
    options = [option for change in changes for option in ("--set", change)]
    return run_cli(what, "digits_vit", "-o", folder, *demo.options, *options, "--json")


@pytest.mark.usefixtures("added")
def test_a_run_with_a_method_a_budget_a_format_and_a_meter_of_another_package(demo: Demo, tmp_path: Path) -> None:
    changes = (
        "prune.method=far",
        "prune.budget.blocks=0.5",
        "prune.block=[48,24]",
        "finetune=null",
        "bench.subjects=[dense,sparse]",
        "bench.batch_sizes=[1]",
        "bench.energy.window_seconds=0.3",
        "export.formats=[listing]",
    )
    result = command(demo, "run", tmp_path / "run", *changes)
    assert result.code == 0, result.err
    reports = json.loads(result.out)
    pruned = reports["prune"]
    assert pruned["method"] == "far"
    assert "far columns went first" in pruned["notes"]
    counts = [(layer["kept_blocks"], layer["blocks"]) for layer in pruned["layers"]]
    total = sum(blocks for _, blocks in counts)
    assert sum(kept for kept, _ in counts) == total // 2
    for layer in sparse_layers(load_model(tmp_path / "run" / "pruned")).values():
        for row in layer.weight.block_mask:
            assert row.tolist() == sorted(row.tolist(), reverse=True), "what is kept is on the left"
    (batch,) = reports["bench"]["batches"]
    assert batch["energy"]["source"] == "a steady meter"
    assert batch["energy"]["subjects"]["sparse"]["average_w"] == pytest.approx(100, rel=0.05)
    (file,) = reports["export"]["files"]
    assert (tmp_path / "run" / "export" / file["file"]).read_text().count("\n") > 20


@pytest.mark.usefixtures("added")
def test_a_method_that_raises_is_named(demo: Demo, tmp_path: Path) -> None:
    few = ("calibrate.images=8", "data.val_images=8", "prune.method=broken")
    assert command(demo, "calibrate", tmp_path / "run", *few).code == 0
    result = command(demo, "prune", tmp_path / "run", *few)
    assert result.code == 3
    error = json.loads(result.out)["error"]
    assert error["message"] == f"the pruning method 'broken' ({__name__}) failed: ZeroDivisionError: no blocks today"
    assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.usefixtures("added")
def test_choices_are_those_of_the_registries() -> None:
    with pytest.raises(UsageError, match="prune.method: should be 'obs', .*'magnitude', 'far' or 'broken'"):
        Recipe.load("digits_vit", ["prune.method=best"])
    with pytest.raises(UsageError, match="should be 'onnx', .*'hub' or 'listing'"):
        Recipe.load("digits_vit", ["export.formats=[ump]"])
    with pytest.raises(UsageError, match="prune.budget.blocks: should be less than or equal to 1 "):
        Recipe.load("digits_vit", ["prune.budget.blocks=2"])
    with pytest.raises(UsageError, match="block: unknown key") as caught:
        Recipe.load("digits_vit", ["prune.budget.block=0.5"])
    assert caught.value.hint == "did you mean 'blocks'?"


def test_without_them_nothing_is_known_of_them() -> None:
    with pytest.raises(UsageError, match="prune.method: should be 'obs'"):
        Recipe.load("digits_vit", ["prune.method=far"])


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a pruning method 'obs' already"):
        METHODS.register("obs", FarColumnsFirst)


def test_every_built_in_is_where_its_registry_says() -> None:
    for one in registry.ALL:
        assert all(callable(one.get(name)) for name in one.names())


def test_a_package_that_is_only_installed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its entry point, and not imported before it is used."""
    point = EntryPoint("ordered", "collections:OrderedDict", "lpvit.test")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "lpvit.test" else [])
    one = Registry("thing", "thing", "lpvit.test", {})
    assert one.names() == ["ordered"]
    assert one.get("ordered").__name__ == "OrderedDict"
    with pytest.raises(UsageError, match="thing: there is no thing 'ordred'"):
        one.get("ordred")


def test_a_package_that_does_not_load_is_named_and_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("gone", "no_such_package:Thing", "lpvit.test")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(
        EnvironmentFault, match="the power meter 'gone' of no_such_package:Thing cannot be loaded: ModuleNotFound"
    ):
        Registry("power meter", "meter", "lpvit.test", {}).get("gone")
    for one in (METERS, FORMATS):
        monkeypatch.setattr(one, "_plugins", {"gone": point})
    _, reasons = open_meter("cpu")
    assert "the power meter 'gone'" in reasons[0]
    assert {".onnx", ".pt2"} <= readers().keys()


def test_a_meter_that_gives_nothing_is_one_of_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead(Steady):
        @classmethod
        def open(cls, uuid: str, allow_mig: bool) -> Steady:
            raise MeterError("dead")

    monkeypatch.setattr(METERS, "names", lambda: ["rapl", "dead"])
    monkeypatch.setattr(METERS, "get", lambda name: Dead)
    assert open_meter("cpu") == (None, ["dead", "dead"])
    assert open_meter("cuda") == (None, [])
