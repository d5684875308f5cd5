"""What one calibration says about every pruning of a model.

A `Plan` has the model's groups and their curves (groups.py), and chooses what each group loses under a budget. It makes no
model: that is the engine's (engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lpvit_cli import distributed
from lpvit_cli.curvature import LayerStatistics
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models.flops import ModelFlops, count_flops
from lpvit_cli.progress import Progress
from lpvit_cli.pruning.allocate import Curve, CurvePoint, allocate, automatic_beta
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.cost import BYTES_PER_VALUE, LayerCost, layer_cost
from lpvit_cli.pruning.coupling import find_couplings
from lpvit_cli.pruning.groups import Group, Option, make_group
from lpvit_cli.pruning.reorder import reordered
from lpvit_cli.recipe.prune import Budget, PruneSection
from lpvit_cli.registry import BUDGETS, METHODS
from lpvit_cli.tasks.base import Loss, Task

PROOF_IMAGES = 2  # on which a model in another order must give the same


@dataclass(frozen=True)
class Allocation:
    """What each group loses under a budget; `masks` once they are made."""

    groups: dict[str, Group]
    points: dict[str, CurvePoint]
    beta: float
    plan: Plan
    masks: dict[str, Tensor] = field(default_factory=dict)  # block masks by layer, coupled ones included
    told: list[str] = field(default_factory=list)  # what a user should know of how it was chosen

    def option(self, name: str) -> Option:
        return self.groups[name].options[self.points[name].curve]

    def planned_masks(self) -> dict[str, Tensor]:
        """Block masks of the layers that decide, as the removal orders have them."""
        return {name: self.option(name).removal.mask(point.removed) for name, point in self.points.items()}

    def notes(self) -> list[str]:
        """What a user should know about this pruning."""
        nothing = self.plan.reference is not None and not any(point.removed for point in self.points.values())
        alone = ["merging tokens alone meets the budget: no weight is removed"] if nothing else []
        return [*self.plan.notes(), *self.told, *alone]

    def distortion(self, name: str) -> float:
        return float(self.option(name).removal.distortion[self.points[name].removed])


@dataclass(frozen=True)
class Prediction:
    """Of a pruned model; `energy_uj` of the prunable layers, for one image."""

    flops: int
    kept_fraction: float  # of the prunable weights
    bytes: int
    energy_uj: float
    latency_ms: float | None  # by the device profile


@dataclass
class Plan:
    """A dense model, its statistics and its groups; or what is left of the `whole` plan's without some neurons and heads."""

    settings: PruneSection
    model: nn.Module  # dense, on the CPU between stages of work
    statistics: dict[str, LayerStatistics]
    calibration: Iterable[tuple[Tensor, Tensor]]  # the images of the statistics, each time it is iterated
    example: Tensor  # an input of one image
    task: Task
    gradient: str  # the kind of loss whose curvature was taken
    seed: int
    device: torch.device
    dtype: torch.dtype = torch.float32  # in which passes over the calibration images compute
    profile: DeviceProfile | None = None
    told: list[str] = field(default_factory=list)  # what a user should know of how it was made
    held_back: Iterable[tuple[Tensor, Tensor]] | None = None  # more images, that the statistics are not of
    reference: nn.Module | None = None  # what pruned models are compared with, where it is not `model`: that without merging
    latency_ms_dense: float | None = None  # of the model that pruned ones are compared with, measured for the profile
    whole: Plan | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)  # of the whole layers, those that narrower ones have
    groups: dict[str, Group] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """Those that may be pruned, by name."""
        return {name: cast(nn.Linear, self.model.get_submodule(name)) for name in self.statistics}

    @cached_property
    def flops(self) -> ModelFlops:
        return count_flops(self.model, self.layers, self.example)

    @cached_property
    def flops_dense(self) -> int:
        """Of the model that pruned ones are compared with."""
        one = self.dense
        return one.flops.total if one.reference is None else count_flops(one.reference, (), one.example).total

    @cached_property
    def method(self) -> Any:
        return METHODS.get(self.settings.method)(self)

    @property
    def dense(self) -> Plan:
        """The plan of the whole model."""
        return self.whole or self

    def new_loss(self) -> Loss:
        """The loss whose curvature was taken, its random numbers from the start; every process draws its own."""
        return self.task.loss(self.gradient, self.seed + distributed.rank())

    def weight(self, layer: str) -> Tensor:
        """[out, in]"""
        return self.layers[layer].weight.detach()

    def take(self, profile: DeviceProfile) -> None:
        """Predict by a profile of the model, or where `model` merges tokens, of the reference."""
        self.latency_ms_dense = profile.model_ms
        self.profile = profile if self.reference is None else _of_merged(profile, self.model, self.reference, self.example)

    def profiled(self) -> DeviceProfile:
        """The device profile, where there must be one."""
        assert self.profile is not None
        return self.profile

    # what is to go

    def allocation(self, budget: Budget, groups: dict[str, Group] | None = None, share: float = 1.0) -> Allocation:
        """Removals of every group under a budget that counts costs; with a `share`, that much of what goes under it. Raises
        UsageError, with what can be reached."""
        groups = groups or self.groups
        curves = self._curves(groups, budget)
        beta = automatic_beta(curves) if self.settings.beta == "auto" else self.settings.beta
        self._require_reachable(budget, curves)
        allowance = _highest(curves) - share * (_highest(curves) - self._allowance(budget))
        return Allocation(groups, distributed.broadcast(allocate(curves, allowance, beta)), beta, self)

    def reachable(self, budget: Budget) -> float:
        """The furthest value of this kind of budget that min_keep allows."""
        return self._as_value(budget, _lowest(self._curves(self.groups, budget)))

    def _require_reachable(self, budget: Budget, curves: dict[str, list[Curve]]) -> None:
        if _lowest(curves) > self._allowance(budget) * (1 + 1e-9):
            furthest, unpruned = (self._as_value(budget, cost) for cost in (_lowest(curves), _highest(curves)))
            low, high = sorted((_rounded(furthest, up=furthest < unpruned), unpruned))
            if f"{low:.4g}" == f"{high:.4g}":
                raise UsageError(
                    f"prune.budget: {budget.kind} {budget.value:g} cannot be reached: with min_keep {self.settings.min_keep:g} "
                    f"removing blocks leaves it at {high:.4g}",
                    "lower prune.min_keep; for a latency, profile a larger batch (target.batch_size), where pruning pays",
                )
            raise UsageError(
                f"prune.budget: {budget.kind} {budget.value:g} cannot be reached: with min_keep {self.settings.min_keep:g} it "
                f"can be from {low:.4g} to {high:.4g}",
                "choose a value in between, lower prune.min_keep, or include more layers",
            )

    def _curves(self, groups: dict[str, Group], budget: Budget) -> dict[str, list[Curve]]:
        curves: dict[str, list[Curve]] = {name: [] for name in groups}
        for name, group in groups.items():
            for option in group.options:
                removal = option.removal
                keep = math.floor(self.settings.min_keep * removal.steps + 1e-9)
                most = removal.steps - (max(1, keep) if group.coupling else keep)
                along = BUDGETS.get(budget.kind).along(self, name, option)
                curves[name].append(Curve(removal.distortion, self._energy_along(name, option), along, most))
        return curves

    def _allowance(self, budget: Budget) -> float:
        """What the prunable layers may keep."""
        kind = BUDGETS.get(budget.kind)
        return float(kind.kept(budget.value) * kind.unit(self.dense) - kind.rest(self))

    def _as_value(self, budget: Budget, kept: float) -> float:
        """The budget that `kept` would just meet; the inverse of `_allowance`."""
        kind = BUDGETS.get(budget.kind)
        return float(kind.value((kept + kind.rest(self)) / kind.unit(self.dense)))

    def total(self, cost: str) -> float:
        """The sum of a cost (`weights`, `flops`) over all prunable layers."""
        return sum(float(getattr(group.options[0].cost, cost).sum()) for group in self.groups.values())

    # energy: by the device profile where that has any, else by the recipe's power model

    @property
    def energy_profile(self) -> DeviceProfile | None:
        """The device profile, if it knows energies and all that is pruned: it has no layers without neurons or heads."""
        whole = not any(group.coupling for group in self.groups.values())
        return self.profile if self.profile and self.profile.rest_mj is not None and whole else None

    def energy_uj(self, name: str, block: Block, mask: Tensor, cost: LayerCost) -> float:
        """Predicted energy of a layer for one image with the masked blocks kept, in microjoules."""
        if self.energy_profile is None:
            return cost.predicted_energy_uj(mask)
        rows = self.flops.tokens[name] * self.energy_profile.batch_size
        mj = self.energy_profile.linear_mj(cost.shape, rows, block, mask.double().mean())
        return 1e3 * float(mj) / self.energy_profile.batch_size

    def _energy_along(self, name: str, option: Option) -> Tensor:
        if self.energy_profile is None:
            return option.removal.along(option.cost.energy_pj)
        energy: Tensor = BUDGETS.get("energy_mj").along(self, name, option)
        return energy

    # predictions

    def predict(self, allocation: Allocation) -> Prediction:
        """What a pruning will cost, from its masks where they are made, else from the plan's."""
        masks = allocation.masks or allocation.planned_masks()
        options = {name: allocation.option(name) for name in self.groups}
        weights = float(sum(one.cost.weights[masks[name]].sum() for name, one in options.items()))
        gone = sum(float(one.cost.flops[~masks[name]].sum()) for name, one in options.items())
        return Prediction(
            flops=self.flops.total - round(gone),
            kept_fraction=weights / self.dense.total("weights"),
            bytes=self.bytes_dense - BYTES_PER_VALUE * round(self.total("weights") - weights),
            energy_uj=sum(self.energy_uj(name, one.block, masks[name], one.cost) for name, one in options.items()),
            latency_ms=self._latency_ms(allocation),
        )

    def _latency_ms(self, allocation: Allocation) -> float | None:
        if self.profile is None or any(group.coupling for group in self.groups.values()):
            return None
        along = {name: BUDGETS.get("latency_ms").along(self, name, allocation.option(name)) for name in self.groups}
        return self.profile.rest_ms + sum(float(along[name][point.removed]) for name, point in allocation.points.items())

    @property
    def energy_uj_dense(self) -> float:
        """Of the prunable layers of the model that pruned ones are compared with."""
        options = {name: group.options[0] for name, group in self.groups.items()}
        whole = {name: torch.ones_like(one.cost.weights, dtype=torch.bool) for name, one in options.items()}
        merged = sum(self.energy_uj(name, one.block, whole[name], one.cost) for name, one in options.items())
        if self.reference is None:
            return merged
        tokens, flops = count_flops(self.reference, self.layers, self.example).tokens, self.flops.tokens
        if self.energy_profile is None:
            costs = [layer_cost(layer, tokens[name], _shape(layer), self.settings.power) for name, layer in self.layers.items()]
            return sum(cost.predicted_energy_uj(torch.ones_like(cost.weights, dtype=torch.bool)) for cost in costs)
        rows = {name: tokens[name] / flops[name] for name in options}  # energies of a profile are in proportion
        return sum(rows[name] * self.energy_uj(name, one.block, whole[name], one.cost) for name, one in options.items())

    @property
    def bytes_dense(self) -> int:
        """Of the dense weights in one safetensors file."""
        return len(save({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}))

    def notes(self) -> list[str]:
        """What a user should know about every pruning by this plan."""
        notes: list[str] = [*self.told, *self.method.notes()]
        if self.energy_profile is not None:
            notes.append(
                f"energy is predicted by the profile of {self.energy_profile.device}: {self.energy_profile.energy_source}"
            )
        elif self.settings.beta and len({self.flops.tokens[name] for name in self.layers}) == 1:
            notes.append(
                "every layer sees the same number of tokens, so a block costs the same power everywhere: beta changes nothing"
            )
        return notes


def build_plan(
    settings: PruneSection,
    model: nn.Module,
    layers: dict[str, nn.Linear],
    statistics: dict[str, LayerStatistics],
    calibration: Iterable[tuple[Tensor, Tensor]],
    *,
    example: Tensor,
    task: Task,
    gradient: str,
    seed: int,
    device: torch.device,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    profile: DeviceProfile | None = None,
    held_back: Iterable[tuple[Tensor, Tensor]] | None = None,
    reference: nn.Module | None = None,
) -> Plan:
    """The curves of all groups.

    `example`: an input of one image. `calibration` gives the images of the statistics, (images [n, C, H, W], labels [n]),
    `held_back` others, to choose by. `dtype`: in which passes over them compute. `reference`: the model that pruned ones are
    compared with, where `model` merges tokens and that one does not.
    Raises UsageError where blocks, patterns or the profile do not fit the layers.
    """
    if profile is not None:
        _require_same_layers(profile, layers)
    told: list[str] = []
    if settings.reorder:
        model, statistics, told = reordered(model, layers, statistics, distributed.on_main(lambda: _first_images(calibration)))
    plan = Plan(settings, model, statistics, calibration, example, task, gradient, seed, device, dtype)
    plan.told, plan.held_back, plan.reference = told, held_back, reference
    if profile is not None:
        plan.take(profile)
    return grouped(plan, progress)


def grouped(plan: Plan, progress: Progress) -> Plan:
    """The plan, with the groups of its layers and their curves."""
    settings, layers = plan.settings, plan.layers
    couplings = find_couplings(plan.model, layers, settings.units, settings.unit_width)
    producers = {name for one in couplings.values() for name in one.producers}
    plan.method.prepare(progress)
    make = partial(make_group, blocks=settings.blocks, balanced="balanced" in settings.patterns, flops=plan.flops)
    for done, name in enumerate(layers, start=1):
        if name not in producers:
            make_one = partial(make, name, layers, couplings.get(name), power=settings.power, removal=plan.method.removal)
            plan.groups[name] = distributed.on_main(make_one)
            progress("layer curves", done, len(layers), name)
    return plan


def _shape(layer: nn.Linear) -> Block:
    return layer.out_features, layer.in_features


def _first_images(calibration: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """[n, C, H, W], enough to tell two models apart."""
    return next(iter(calibration))[0][:PROOF_IMAGES]


def _require_same_layers(profile: DeviceProfile, layers: dict[str, nn.Linear]) -> None:
    """What a profile takes for the rest of the model is what its own layers leave of it."""
    measured = {name for layer in profile.layers for name in layer.names}
    if other := sorted(measured ^ layers.keys()):
        raise UsageError(
            f"prune.profile: made for other layers: {other[0]} is only {'there' if other[0] in measured else 'here'}",
            "profile with the same model and prune.layers: lpvit profile RECIPE",
        )


def _of_merged(profile: DeviceProfile, model: nn.Module, reference: nn.Module, example: Tensor) -> DeviceProfile:
    """The profile of a model, as that of a copy which merges tokens."""
    names = [name for layer in profile.layers for name in layer.names]
    merged, dense = (count_flops(one, names, example) for one in (model, reference))
    weights = {name: cast(nn.Linear, model.get_submodule(name)).weight.numel() for name in names}
    after, before = (one.total - sum(2 * one.tokens[name] * weights[name] for name in names) for one in (merged, dense))
    return profile.with_rows({name: rows * profile.batch_size for name, rows in merged.tokens.items()}, after / before)


def _rounded(value: float, up: bool) -> float:
    """To four digits, in the direction that can still be reached, so that what is told can be asked for."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return (math.ceil(value / step - 1e-9) if up else math.floor(value / step + 1e-9)) * step


def _lowest(curves: dict[str, list[Curve]]) -> float:
    return sum(min(float(c.kept_cost[: c.most_removals + 1].min()) for c in options) for options in curves.values())


def _highest(curves: dict[str, list[Curve]]) -> float:
    return sum(float(options[0].kept_cost[0]) for options in curves.values())
