"""What one calibration says about every pruning of a model: for prune, its sweep, the search for an accuracy and dry runs.

A `Plan` has the model's parts (pruning/parts.py), counts what any budget counts, and chooses what each part loses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lpvit_cli.curvature import (
    ImageGradients,
    LayerStatistics,
    load_statistics,
    single_images,
)
from lpvit_cli.data import Batches, class_names
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models import VisionModel, build_model, device_of, prunable_layers
from lpvit_cli.pruning.allocate import Choice, Curve, allocate, automatic_beta
from lpvit_cli.pruning.blocks import Block
from lpvit_cli.pruning.cost import BYTES_PER_VALUE, LayerCost, ModelFlops, count_flops
from lpvit_cli.pruning.fisher import GRADIENT_METHODS, block_scores
from lpvit_cli.pruning.parts import Option, Part, make_part
from lpvit_cli.pruning.patterns import find_pairs
from lpvit_cli.recipe import Budget, PruneSection, Recipe
from lpvit_cli.run import Progress, Run
from lpvit_cli.stages import CALIBRATE
from lpvit_cli.stages.calibrate import STATISTICS, calibration_batches
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches


@dataclass(frozen=True)
class Pruned:
    """A pruning: what each part loses, and what that is predicted to cost."""

    parts: dict[str, Part]
    choices: dict[str, Choice]
    beta: float
    masks: dict[str, Tensor] = field(default_factory=dict)  # block masks by layer, pairs included

    def option(self, name: str) -> Option:
        return self.parts[name].options[self.choices[name].curve]

    def planned_masks(self) -> dict[str, Tensor]:
        """Block masks of the layers that decide, as the removal orders have them."""
        return {name: self.option(name).removal.mask(choice.removed) for name, choice in self.choices.items()}

    def distortion(self, name: str) -> float:
        return float(self.option(name).removal.distortion[self.choices[name].removed])


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
    """A dense model, its statistics and its parts."""

    recipe: Recipe
    model: VisionModel  # dense, on the CPU between stages of work
    layers: dict[str, nn.Linear]
    statistics: dict[str, LayerStatistics]
    flops: ModelFlops
    parts: dict[str, Part]
    calibration: Iterable[tuple[Tensor, Tensor]]
    validation: Batches | None  # None: a plan whose models are evaluated elsewhere
    profile: DeviceProfile | None
    gradients: ImageGradients | None  # with mfac and fisher

    @property
    def settings(self) -> PruneSection:
        return self.recipe.prune

    @property
    def skipped(self) -> list[str]:
        """Validation images that could not be read."""
        return self.validation.skipped if self.validation else []

    @property
    def by_obs(self) -> bool:
        return self.settings.method == "obs"

    @property
    def device(self) -> torch.device:
        return device_of(self.recipe)

    def evaluate(self, model: VisionModel, progress: Progress, what: str) -> Accuracy:
        assert self.validation is not None
        result = evaluate_model(model, self.validation, self.recipe, self.device, progress, what)
        model.cpu()
        return result

    # what is to go

    def allocation(self, budget: Budget, parts: dict[str, Part] | None = None) -> Pruned:
        """Removals of every part under a budget that counts costs. Raises UsageError, with what can be reached."""
        parts = parts or self.parts
        curves = self._curves(parts, budget)
        beta = automatic_beta(curves) if self.settings.beta == "auto" else self.settings.beta
        self._require_reachable(budget, curves)
        return Pruned(parts, allocate(curves, self._allowance(budget), beta), beta)

    def reachable(self, budget: Budget) -> float:
        """The furthest value of this kind of budget that min_keep allows."""
        return self._in_units_of(budget, _lowest(self._curves(self.parts, budget)))

    def _require_reachable(self, budget: Budget, curves: dict[str, list[Curve]]) -> None:
        if _lowest(curves) > self._allowance(budget) * (1 + 1e-9):
            furthest, unpruned = (self._in_units_of(budget, cost) for cost in (_lowest(curves), _highest(curves)))
            low, high = sorted((_rounded(furthest, up=furthest < unpruned), unpruned))
            if f"{low:.4g}" == f"{high:.4g}":
                raise UsageError(
                    f"prune.budget: {budget.kind} {budget.value:g} cannot be reached: with min_keep {self.settings.min_keep:g} "
                    f"removing blocks leaves it at {high:.4g}",
                    "lower prune.min_keep; for a latency, profile a larger batch (profile.batch_size), where pruning pays",
                )
            raise UsageError(
                f"prune.budget: {budget.kind} {budget.value:g} cannot be reached: with min_keep {self.settings.min_keep:g} it "
                f"can be from {low:.4g} to {high:.4g}",
                "choose a value in between, lower prune.min_keep, or include more layers",
            )

    def _curves(self, parts: dict[str, Part], budget: Budget) -> dict[str, list[Curve]]:
        curves: dict[str, list[Curve]] = {name: [] for name in parts}
        for name, part in parts.items():
            for option in part.options:
                removal = option.removal
                keep = math.ceil(self.settings.min_keep * removal.steps - 1e-9)
                most = removal.steps - (max(1, keep) if part.pair else keep)
                kept_cost, energy = self._kept_cost(name, option, budget), self._energy_along(name, option)
                curves[name].append(Curve(removal.distortion, energy, kept_cost, most))
        return curves

    # energy: by the device profile where that has any, else by the recipe's power model

    @property
    def energy_profile(self) -> DeviceProfile | None:
        """The device profile, if it knows energies and all that is pruned: it has no layers without neurons or heads."""
        whole = not any(part.pair for part in self.parts.values())
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
        return self._kept_cost(name, option, Budget(energy_mj=1))

    # what a budget counts: along a layer's removals, in the rest of the model, and as the user's number

    def _kept_cost(self, name: str, option: Option, budget: Budget) -> Tensor:
        if budget.flops is not None:
            return option.removal.along(option.cost.flops)
        if budget.sparsity is not None:
            return option.removal.along(option.cost.weights)
        assert self.profile is not None
        along = self.profile.linear_ms if budget.latency_ms is not None else self.profile.linear_mj
        kept = option.removal.along(torch.ones(option.removal.grid, dtype=torch.float64)) / len(option.removal.order)
        return along(option.cost.shape, self.flops.tokens[name] * self.profile.batch_size, option.block, kept)

    def _rest(self, budget: Budget) -> float:
        if budget.flops is not None:
            return self.flops.total - self._sum("flops")
        if budget.sparsity is not None:
            return 0.0
        assert self.profile is not None
        return self.profile.rest_ms if budget.latency_ms is not None else self.profile.rest_mj or 0.0

    def _unit(self, budget: Budget) -> float:
        """The cost that is 1 in the user's number."""
        if budget.flops is not None:
            return self.flops.total
        if budget.sparsity is not None:
            return self._sum("weights")
        return 1.0 if budget.latency_ms is not None or self.profile is None else self.profile.batch_size

    def _sum(self, cost: str) -> float:
        return sum(float(getattr(part.options[0].cost, cost).sum()) for part in self.parts.values())

    def _allowance(self, budget: Budget) -> float:
        """What the prunable layers may keep."""
        value = 1 - budget.value if budget.sparsity is not None else budget.value
        return value * self._unit(budget) - self._rest(budget)

    def _in_units_of(self, budget: Budget, kept: float) -> float:
        """The budget that `kept` would just meet; the inverse of `_allowance`."""
        value = (kept + self._rest(budget)) / self._unit(budget)
        return 1 - value if budget.sparsity is not None else value

    def predict(self, plan: Pruned) -> Prediction:
        """What a pruning will cost, from its masks where they are made, else from the plan's."""
        masks = plan.masks or plan.planned_masks()
        kept = {name: plan.option(name).cost.weights[masks[name]].sum() for name in self.parts}
        options = {name: plan.option(name) for name in self.parts}
        energy = sum(self.energy_uj(name, one.block, masks[name], one.cost) for name, one in options.items())
        gone = sum(float(plan.option(name).cost.flops[~masks[name]].sum()) for name in self.parts)
        latency = None
        if self.profile is not None and not any(part.pair for part in self.parts.values()):
            along = {name: self._kept_cost(name, plan.option(name), Budget(latency_ms=1)) for name in self.parts}
            latency = self.profile.rest_ms + sum(float(along[name][choice.removed]) for name, choice in plan.choices.items())
        weights = float(sum(kept.values()))
        return Prediction(
            flops=self.flops.total - round(gone),
            kept_fraction=weights / self._sum("weights"),
            bytes=self.bytes_dense - BYTES_PER_VALUE * round(self._sum("weights") - weights),
            energy_uj=energy,
            latency_ms=latency,
        )

    @property
    def energy_uj_dense(self) -> float:
        options = {name: part.options[0] for name, part in self.parts.items()}
        whole = {name: torch.ones_like(one.cost.weights, dtype=torch.bool) for name, one in options.items()}
        return sum(self.energy_uj(name, one.block, whole[name], one.cost) for name, one in options.items())

    @property
    def bytes_dense(self) -> int:
        return len(save(self.model.state_dict()))


def make_plan(recipe: Recipe, run: Run, progress: Progress) -> Plan:
    """The plan of a run, from its calibration."""
    torch.manual_seed(recipe.seed)
    profile = open_profile(recipe, run)
    model = build_model(recipe.model)
    validation = validation_batches(recipe, model)
    if names := class_names(validation.source):
        model.pretrained_cfg["label_names"] = names
    layers = prunable_layers(model, recipe.prune.layers)
    statistics = load_statistics(run.artefact(CALIBRATE) / STATISTICS, list(layers))
    return build_plan(recipe, model, statistics, calibration_batches(recipe, model), validation, profile, progress)


def build_plan(
    recipe: Recipe,
    model: VisionModel,
    statistics: dict[str, LayerStatistics],
    calibration: Iterable[tuple[Tensor, Tensor]],
    validation: Batches | None,
    profile: DeviceProfile | None,
    progress: Progress,
) -> Plan:
    """`calibration` gives the images of the statistics, (images [n, 3, H, W], labels [n]), each time it is iterated."""
    settings, device = recipe.prune, device_of(recipe)
    layers = prunable_layers(model, settings.layers)
    shared = [pattern for pattern in settings.patterns if pattern != "balanced"]
    pairs = find_pairs(model, layers, shared, settings.blocks[0][1])
    producers = {pair.producer for pair in pairs.values()}
    flops = count_flops(model, layers)
    if profile is not None:
        _require_same_layers(profile, layers)
    gradients, scores = None, {}
    if settings.method in GRADIENT_METHODS:
        images = single_images(calibration, settings.fisher_images)
        gradients = ImageGradients(model, layers, images, recipe.calibrate.gradient, recipe.seed, device)
        scores = block_scores(settings.method, gradients, settings.blocks, partial(progress, "gradients of single images"))
    parts = {}
    for done, name in enumerate(layers, start=1):
        if name not in producers:
            pair = pairs.get(name)
            parts[name] = make_part(name, layers, pair, statistics[name], flops, scores, settings, device)
            progress("layer curves", done, len(layers), name)
    return Plan(recipe, model, layers, statistics, flops, parts, calibration, validation, profile, gradients)


def open_profile(recipe: Recipe, run: Run) -> DeviceProfile | None:
    """The profile that the recipe names, or where its budget needs one, that of this run."""
    path = run.profile_path()
    if path is None:
        return None
    profile = DeviceProfile.load(path)
    if recipe.prune.budget.energy_mj is not None and profile.rest_mj is None:
        raise UsageError(
            f"prune.budget: energy_mj: no meter has filled this profile: {'; '.join(profile.energy_reasons)} ({path})",
            "run `lpvit profile` where a power meter can be read, or with --fit, or give a latency_ms or flops budget",
        )
    return profile


def _require_same_layers(profile: DeviceProfile, layers: dict[str, nn.Linear]) -> None:
    """What a profile takes for the rest of the model is what its own layers leave of it."""
    measured = {name for layer in profile.layers for name in layer.names}
    if other := sorted(measured ^ layers.keys()):
        raise UsageError(
            f"prune.profile: made for other layers: {other[0]} is only {'there' if other[0] in measured else 'here'}",
            "profile with the same model and prune.layers: lpvit profile RECIPE",
        )


def _rounded(value: float, up: bool) -> float:
    """To four digits, in the direction that can still be reached, so that what is told can be asked for."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return (math.ceil(value / step - 1e-9) if up else math.floor(value / step + 1e-9)) * step


def _lowest(curves: dict[str, list[Curve]]) -> float:
    return sum(min(float(c.kept_cost[: c.most_removals + 1].min()) for c in options) for options in curves.values())


def _highest(curves: dict[str, list[Curve]]) -> float:
    return sum(float(options[0].kept_cost[0]) for options in curves.values())
