"""What one calibration says about every pruning of a model: for prune, its sweep, the search for an accuracy and dry runs.

A `Part` is what is decided together: the blocks of one layer, or the neurons or heads that two layers share. Each part has an
`Option` for every block shape: its removal order with the distortion along it, and what a block costs to run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lpvit_cli.curvature import (
    ImageGradients,
    LayerStatistics,
    calibration_loss,
    class_probabilities,
    divergence,
    load_statistics,
    output_moments,
    single_images,
)
from lpvit_cli.data import Batches, class_names
from lpvit_cli.errors import UsageError
from lpvit_cli.measure.accuracy import Accuracy
from lpvit_cli.measure.profile import DeviceProfile
from lpvit_cli.models import VisionModel, build_model, device_of, prunable_layers
from lpvit_cli.pruning.allocate import Choice, Curve, allocate, automatic_beta
from lpvit_cli.pruning.blocks import Block, require_fit
from lpvit_cli.pruning.cost import BYTES_PER_VALUE, LayerCost, ModelFlops, count_flops, layer_cost
from lpvit_cli.pruning.fisher import GRADIENT_METHODS, block_scores, compensated_by_mfac
from lpvit_cli.pruning.patterns import Pair, find_pairs
from lpvit_cli.pruning.saliency import METHODS, Removal, additive
from lpvit_cli.pruning.sequential import Target, images_that_fit, prune_sequentially
from lpvit_cli.pruning.surgeon import compensated, removal_order
from lpvit_cli.recipe import Budget, PruneSection, Recipe
from lpvit_cli.run import Progress, Run
from lpvit_cli.sparse import narrow, sparsify
from lpvit_cli.stages import CALIBRATE
from lpvit_cli.stages.calibrate import STATISTICS, calibration_batches
from lpvit_cli.stages.evaluate import evaluate_model, validation_batches


@dataclass(frozen=True)
class Option:
    """One way to prune a part: blocks of one shape, the order in which they go, and what each costs to run."""

    block: Block
    removal: Removal
    cost: LayerCost  # of all that goes with a block: in a pair, the producer's rows too
    greedy: tuple[Tensor, Tensor] | None  # of obs: order and errors of each block row [rows, cols]

    def reweighed(self, old: Tensor, new: Tensor, balanced: bool) -> Option:
        """The errors of each block row scaled as the mean weight of its outputs has changed; old and new [out, out]."""
        assert self.greedy is not None
        order, errors = self.greedy
        after, before = (weights.diagonal().double().split(self.block[0]) for weights in (new, old))
        ratio = torch.stack([a.sum() / b.sum().clamp_min(1e-300) for a, b in zip(after, before, strict=True)])
        return replace(self, removal=Removal.greedy(order, errors * ratio[:, None], balanced))


@dataclass(frozen=True)
class Part:
    """Blocks of one layer; or of the consumer of a pair, the producer's rows going along."""

    options: list[Option]
    balanced: bool
    pair: Pair | None
    costs: dict[Block, dict[str, LayerCost]]  # of each layer that the part prunes

    def masks(self, layer: str, mask: Tensor) -> dict[str, Tensor]:
        """Block masks of all its layers for one of the layer that decides."""
        return {layer: mask} | ({self.pair.producer: self.pair.producer_mask(mask)} if self.pair else {})


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
    """Of a pruned model; energy of the prunable layers by the recipe's power model, latency by the device profile."""

    flops: int
    kept_fraction: float  # of the prunable weights
    bytes: int
    energy_uj: float
    latency_ms: float | None


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

    def evaluate(self, model: VisionModel, progress: Progress, what: str) -> Accuracy:
        assert self.validation is not None
        result = evaluate_model(model, self.validation, self.recipe, device_of(self.recipe), progress, what)
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
                kept_cost = self._kept_cost(name, option, budget)
                curves[name].append(Curve(removal.distortion, removal.along(option.cost.energy_pj), kept_cost, most))
        return curves

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
        energy = sum(plan.option(name).cost.predicted_energy_uj(masks[name]) for name in self.parts)
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
        costs = [part.options[0].cost for part in self.parts.values()]
        return sum(cost.predicted_energy_uj(torch.ones_like(cost.weights, dtype=torch.bool)) for cost in costs)

    @property
    def bytes_dense(self) -> int:
        return len(save(self.model.state_dict()))

    # making it so

    def prune(self, budget: Budget, progress: Progress) -> tuple[VisionModel, Pruned]:
        """A pruned copy of the model. With `obs` and `mfac` the kept weights make up for the removed ones.

        Layers are weighed by the gradients of their outputs; those of the dense model say little about a model that has lost
        most of its blocks. So `prune.reweigh` times the gradients of the model pruned so far are added, and the budget is
        allocated anew.
        """
        weights = {name: self.statistics[name].loss_weights for name in self.parts}
        plan = self.allocation(budget)
        if self.by_obs and self.settings.reweigh:
            plan, weights = self._weighed_anew(plan, weights, budget, progress)
        if self.settings.method == "mfac":
            model, masks = self._compensated_by_mfac(plan, progress)
        elif not self.by_obs:
            model, masks = copy.deepcopy(self.model), plan.planned_masks()
        elif self.settings.sequential:
            model, masks = self._sequential(plan, weights, progress)
        else:
            model, masks = self._compensated(plan, progress)
        return self._packed(model.cpu(), plan, masks)

    def _weighed_anew(
        self, plan: Pruned, weights: dict[str, Tensor], budget: Budget, progress: Progress
    ) -> tuple[Pruned, dict[str, Tensor]]:
        """Of the allocations of all rounds, the one whose model is nearest to the dense one on the calibration images."""
        rounds, device = self.settings.reweigh, device_of(self.recipe)
        target = class_probabilities(self.model, self.calibration, device)
        self.model.cpu()
        tried = []
        for done in range(rounds + 1):
            model, _ = self._compensated(plan, progress)
            progress("reweighing", done, rounds, f"round {done} of {rounds}")
            tried.append((divergence(model, target, self.calibration, device), plan, weights))
            if done == rounds:
                break
            loss = calibration_loss(self.recipe.calibrate.gradient, self.recipe.seed)
            moments = output_moments(model, self.parts, self.calibration, loss, device)
            weights = {
                name: self.statistics[name].loss_weights + moment.cpu() / self.statistics[name].images
                for name, moment in moments.items()
            }
            plan = self.allocation(budget, self._reweighed(weights))
        _, plan, weights = min(tried, key=lambda one: (math.isnan(one[0]), one[0]))  # NaN compares with nothing
        return plan, weights

    def _reweighed(self, weights: dict[str, Tensor]) -> dict[str, Part]:
        made = {}
        for name, part in self.parts.items():
            old = self.statistics[name].loss_weights
            made[name] = replace(part, options=[o.reweighed(old, weights[name], part.balanced) for o in part.options])
        return made

    def _compensated(self, plan: Pruned, progress: Progress) -> tuple[VisionModel, dict[str, Tensor]]:
        """Each layer alone: least squares on the dense model's inputs."""
        model, masks, device = copy.deepcopy(self.model), plan.planned_masks(), device_of(self.recipe)
        for done, (name, mask) in enumerate(masks.items(), start=1):
            weight, hessian = self.layers[name].weight.detach().to(device), self.statistics[name].hessian.to(device)
            model.get_submodule(name).weight.data = compensated(weight, hessian, mask, plan.option(name).block).cpu()
            progress("compensating", done, len(masks), name)
        return model, masks

    def _compensated_by_mfac(self, plan: Pruned, progress: Progress) -> tuple[VisionModel, dict[str, Tensor]]:
        assert self.gradients is not None
        model, masks = copy.deepcopy(self.model), plan.planned_masks()
        blocks = {name: plan.option(name).block for name in masks}
        weights = compensated_by_mfac(self.gradients, masks, blocks, partial(progress, "compensating"))
        for name, weight in weights.items():
            model.get_submodule(name).weight.data = weight
        return model, masks

    def _sequential(
        self, plan: Pruned, weights: dict[str, Tensor], progress: Progress
    ) -> tuple[VisionModel, dict[str, Tensor]]:
        device = device_of(self.recipe)
        targets = {name: self._target(plan, name) for name in plan.choices}
        done: list[str] = []

        def on_layer(name: str) -> None:
            done.append(name)
            progress("pruning in sequence", len(done), len(targets), name)

        model = copy.deepcopy(self.model).to(device)
        batches = [images.to(device) for images in self.sequential_images()]
        masks = prune_sequentially(self.model.to(device), model, targets, weights, batches, on_layer)
        self.model.cpu()
        return model, masks

    def _target(self, plan: Pruned, name: str) -> Target:
        """What the budget counts of the planned blocks must hold for those that are removed: a profile counts blocks."""
        option = plan.option(name)
        costs = torch.ones_like(option.cost.weights) if self.settings.budget.needs_profile else option.cost.weights
        kept = float(option.removal.along(costs)[plan.choices[name].removed])
        return Target(option.block, costs, kept, plan.parts[name].balanced)

    def images_in_sequence(self) -> int:
        """How many calibration images sequential pruning takes: all that fit into its memory."""
        inputs = [self.flops.tokens[name] * self.layers[name].in_features for name in self.parts]
        return min(self.statistics[next(iter(self.parts))].images, images_that_fit(inputs, device_of(self.recipe)))

    def sequential_images(self) -> list[Tensor]:
        batches, wanted = [], self.images_in_sequence()
        for images, _ in self.calibration:
            batches.append(images[:wanted])
            wanted -= len(batches[-1])
            if wanted == 0:
                break
        return batches

    def _packed(self, model: VisionModel, plan: Pruned, masks: dict[str, Tensor]) -> tuple[VisionModel, Pruned]:
        """Removed blocks leave the model: zero blocks are not stored, neurons and heads are cut out."""
        for name, mask in masks.items():
            part, whole = plan.parts[name], [name] if mask.all() else []
            if part.pair:
                narrow(model.get_submodule(part.pair.module), part.pair.kept(mask))
                whole = [part.pair.producer, part.pair.consumer]
            elif not whole:
                sparsify(model, {name: mask}, plan.option(name).block)
            for layer in whole:  # one block: runs as a dense layer does
                dense = model.get_submodule(layer)
                assert isinstance(dense, nn.Linear)
                sparsify(model, {layer: torch.ones(1, 1, dtype=torch.bool)}, (dense.out_features, dense.in_features))
        by_layer: dict[str, Tensor] = {}
        for name in self.parts:
            by_layer |= plan.parts[name].masks(name, masks[name])
        return model, replace(plan, masks={name: by_layer[name] for name in self.layers})


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
    for done, (name, layer) in enumerate(layers.items(), start=1):
        if name in producers:
            continue
        pair = pairs.get(name)
        balanced = pair is None and "balanced" in settings.patterns
        costs: dict[Block, dict[str, LayerCost]] = {}
        options = []
        for block in [pair.block] if pair else settings.blocks:
            require_fit(name, (layer.out_features, layer.in_features), block)
            costs[block] = _costs(name, layers, flops, block, pair, settings)
            cost = _together(pair, costs[block], flops) if pair else costs[block][name]
            score = scores.get((name, block))
            weight = layer.weight.detach()
            options.append(_option(weight, statistics[name], block, cost, balanced, settings.method, score, device))
            progress("layer curves", done, len(layers), name)
        parts[name] = Part(options, balanced, pair, costs)
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
            "run `lpvit profile` where a power meter can be read, or give a latency_ms or flops budget",
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


def _option(
    weight: Tensor,
    statistics: LayerStatistics,
    block: Block,
    cost: LayerCost,
    balanced: bool,
    method: str,
    score: Tensor | None,
    device: torch.device,
) -> Option:
    """`score` [rows, cols]: of the methods whose scores are not made of statistics. Only obs is worth a GPU."""
    if score is not None:
        return Option(block, additive(score), cost, None)
    if method != "obs":
        return Option(block, METHODS[method](weight, statistics, block), cost, None)
    gathered = statistics.to(device)
    greedy = removal_order(weight.to(device), gathered.hessian / 2, block, gathered.loss_weights)
    return Option(block, Removal.greedy(*greedy, balanced), cost, greedy)


def _costs(
    name: str, layers: dict[str, nn.Linear], flops: ModelFlops, block: Block, pair: Pair | None, settings: PruneSection
) -> dict[str, LayerCost]:
    """By layer, what each block costs; a producer's blocks are whole rows."""
    made = {name: layer_cost(layers[name], flops.tokens[name], block, settings.power)}
    if pair:
        rows = layers[pair.producer]
        made[pair.producer] = layer_cost(rows, flops.tokens[pair.producer], (pair.width, rows.in_features), settings.power)
    return made


def _together(pair: Pair, costs: dict[str, LayerCost], flops: ModelFlops) -> LayerCost:
    """What a group of neurons, or a head, costs in both layers and between them [1, groups]."""
    consumer, producer = costs[pair.consumer], costs[pair.producer]

    def of(name: str) -> Tensor:
        rows: Tensor = getattr(producer, name).reshape(pair.repeats, -1).sum(dim=0)
        columns: Tensor = getattr(consumer, name)
        return columns + rows

    between = flops.attention.get(pair.module, 0) / consumer.weights.shape[1]
    fixed = consumer.fixed_energy_pj + producer.fixed_energy_pj
    return LayerCost(consumer.shape, of("weights"), of("flops") + between, of("energy_pj"), fixed)


def _rounded(value: float, up: bool) -> float:
    """To four digits, in the direction that can still be reached, so that what is told can be asked for."""
    step = 10.0 ** (math.floor(math.log10(value)) - 3) if value > 0 else 1.0
    return (math.ceil(value / step - 1e-9) if up else math.floor(value / step + 1e-9)) * step


def _lowest(curves: dict[str, list[Curve]]) -> float:
    return sum(min(float(c.kept_cost[: c.most_removals + 1].min()) for c in options) for options in curves.values())


def _highest(curves: dict[str, list[Curve]]) -> float:
    return sum(float(options[0].kept_cost[0]) for options in curves.values())
