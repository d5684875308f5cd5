"""Making a plan's pruned model: layers weighed anew, blocks removed, kept weights compensated, zero blocks packed away."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lpvit_cli.curvature import calibration_loss, class_probabilities, divergence, output_moments
from lpvit_cli.models import VisionModel
from lpvit_cli.pruning.fisher import compensated_by_mfac
from lpvit_cli.pruning.parts import Part
from lpvit_cli.pruning.sequential import Target, images_that_fit, prune_sequentially
from lpvit_cli.pruning.surgeon import compensated
from lpvit_cli.recipe import Budget
from lpvit_cli.run import Progress
from lpvit_cli.sparse import narrow, sparsify
from lpvit_cli.stages.plan import Plan, Pruned

IMAGES_A_PASS = 64  # in sequence: each pass waits in a thread of its own, which brings threads for its products


def prune_model(plan: Plan, budget: Budget, progress: Progress) -> tuple[VisionModel, Pruned]:
    """A pruned copy of the model. With `obs` and `mfac` the kept weights make up for the removed ones.

    Layers are weighed by the gradients of their outputs; those of the dense model say little about a model that has lost
    most of its blocks. So `prune.reweigh` times the gradients of the model pruned so far are added, and the budget is
    allocated anew.
    """
    weights = {name: plan.statistics[name].loss_weights for name in plan.parts}
    pruned = plan.allocation(budget)
    if plan.by_obs and plan.settings.reweigh:
        pruned, weights = _weighed_anew(plan, pruned, weights, budget, progress)
    if plan.settings.method == "mfac":
        model, masks = _compensated_by_mfac(plan, pruned, progress)
    elif not plan.by_obs:
        model, masks = copy.deepcopy(plan.model), pruned.planned_masks()
    elif plan.settings.sequential:
        model, masks = _sequential(plan, pruned, weights, budget, progress)
    else:
        model, masks = _compensated(plan, pruned, progress)
    return _packed(plan, model.cpu(), pruned, masks)


def _weighed_anew(
    plan: Plan, pruned: Pruned, weights: dict[str, Tensor], budget: Budget, progress: Progress
) -> tuple[Pruned, dict[str, Tensor]]:
    """Of the allocations of all rounds, the one whose model is nearest to the dense one on the calibration images."""
    rounds, device = plan.settings.reweigh, plan.device
    target = class_probabilities(plan.model, plan.calibration, device)
    plan.model.cpu()
    model, nearest, best = plan.model, math.inf, (pruned, weights)
    for done in range(rounds + 1):
        if done:
            loss = calibration_loss(plan.recipe.calibrate.gradient, plan.recipe.seed)
            moments = output_moments(model, plan.parts, plan.calibration, loss, device)
            weights = {
                name: plan.statistics[name].loss_weights + moment.cpu() / plan.statistics[name].images
                for name, moment in moments.items()
            }
            pruned = plan.allocation(budget, _reweighed(plan, weights))
        model, _ = _compensated(plan, pruned, progress)
        progress("reweighing", done, rounds, f"round {done} of {rounds}")
        found = divergence(model, target, plan.calibration, device)
        if found < nearest:  # NaN is not
            nearest, best = found, (pruned, weights)
    return best


def _reweighed(plan: Plan, weights: dict[str, Tensor]) -> dict[str, Part]:
    made = {}
    for name, part in plan.parts.items():
        old = plan.statistics[name].loss_weights
        made[name] = replace(part, options=[o.reweighed(old, weights[name], part.balanced) for o in part.options])
    return made


def _compensated(plan: Plan, pruned: Pruned, progress: Progress) -> tuple[VisionModel, dict[str, Tensor]]:
    """Each layer alone: least squares on the dense model's inputs."""
    model, masks, device = copy.deepcopy(plan.model), pruned.planned_masks(), plan.device
    for done, (name, mask) in enumerate(masks.items(), start=1):
        weight, hessian = plan.layers[name].weight.detach().to(device), plan.statistics[name].hessian.to(device)
        model.get_submodule(name).weight.data = compensated(weight, hessian, mask, pruned.option(name).block).cpu()
        progress("compensating", done, len(masks), name)
    return model, masks


def _compensated_by_mfac(plan: Plan, pruned: Pruned, progress: Progress) -> tuple[VisionModel, dict[str, Tensor]]:
    assert plan.gradients is not None
    model, masks = copy.deepcopy(plan.model), pruned.planned_masks()
    blocks = {name: pruned.option(name).block for name in masks}
    weights = compensated_by_mfac(plan.gradients, masks, blocks, partial(progress, "compensating"))
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return model, masks


def _sequential(
    plan: Plan, pruned: Pruned, weights: dict[str, Tensor], budget: Budget, progress: Progress
) -> tuple[VisionModel, dict[str, Tensor]]:
    device = plan.device
    targets = {name: _target(plan, pruned, budget, name) for name in pruned.choices}
    done: list[str] = []

    def on_layer(name: str) -> None:
        done.append(name)
        progress("pruning in sequence", len(done), len(targets), name)

    model = copy.deepcopy(plan.model).to(device)
    batches = [images.to(device) for images in torch.cat(sequential_images(plan)).split(IMAGES_A_PASS)]
    masks = prune_sequentially(plan.model.to(device), model, targets, weights, batches, on_layer)
    plan.model.cpu()
    return model, masks


def _target(plan: Plan, pruned: Pruned, budget: Budget, name: str) -> Target:
    """What the budget counts of the planned blocks must hold for those that are removed: a profile counts blocks."""
    option = pruned.option(name)
    costs = torch.ones_like(option.cost.weights) if budget.needs_profile else option.cost.weights
    if budget.flops is not None:
        costs = option.cost.flops
    kept = float(option.removal.along(costs)[pruned.choices[name].removed])
    return Target(option.block, costs, kept, pruned.parts[name].balanced)


def images_in_sequence(plan: Plan) -> int:
    """How many calibration images sequential pruning takes: all that fit into its memory."""
    inputs = [plan.flops.tokens[name] * plan.layers[name].in_features for name in plan.parts]
    return min(plan.statistics[next(iter(plan.parts))].images, images_that_fit(inputs, plan.device))


def sequential_images(plan: Plan) -> list[Tensor]:
    batches, wanted = [], images_in_sequence(plan)
    for images, _ in plan.calibration:
        batches.append(images[:wanted])
        wanted -= len(batches[-1])
        if wanted == 0:
            break
    return batches


def _packed(plan: Plan, model: VisionModel, pruned: Pruned, masks: dict[str, Tensor]) -> tuple[VisionModel, Pruned]:
    """Removed blocks leave the model: zero blocks are not stored, neurons and heads are cut out."""
    for name, mask in masks.items():
        part, whole = pruned.parts[name], [name] if mask.all() else []
        if part.pair:
            narrow(model.get_submodule(part.pair.module), part.pair.kept(mask))
            whole = [part.pair.producer, part.pair.consumer]
        elif not whole:
            sparsify(model, {name: mask}, pruned.option(name).block)
        for layer in whole:  # one block: runs as a dense layer does
            dense = model.get_submodule(layer)
            assert isinstance(dense, nn.Linear)
            sparsify(model, {layer: torch.ones(1, 1, dtype=torch.bool)}, (dense.out_features, dense.in_features))
    by_layer: dict[str, Tensor] = {}
    for name in plan.parts:
        by_layer |= pruned.parts[name].masks(name, masks[name])
    return model, replace(pruned, masks={name: by_layer[name] for name in plan.layers})
