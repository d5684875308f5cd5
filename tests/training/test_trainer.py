"""The recovery loop: what a step is, which epoch is kept, when it stops, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative
from torch import Tensor, nn

from lpvit_cli.curvature.mfac import MFAC
from lpvit_cli.data.batches import Batches
from lpvit_cli.data.readers import SyntheticReader
from lpvit_cli.data.transforms import transform_for
from lpvit_cli.errors import CheckFailed, EnvironmentFault
from lpvit_cli.recipe.finetune import Augment, FinetuneSection
from lpvit_cli.recovery import trainer as module
from lpvit_cli.recovery.lora import adapt
from lpvit_cli.recovery.objective import Objective
from lpvit_cli.recovery.start import choose_trained
from lpvit_cli.recovery.trainer import Trainer, learning_rate
from lpvit_cli.sparse import sparsify
from lpvit_cli.tasks.quality import ClassificationQuality

MASK = torch.tensor([[True, False], [False, True]] * 8)
CPU = torch.device("cpu")
BEFORE = ClassificationQuality(8, 0.0, 0.0)


def quiet(done: int, total: int, detail: str) -> None:
    pass


@pytest.fixture
def make(tiny_vit: nn.Module, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of a pruned model of its own, always from the same weights."""
    sparsify(tiny_vit, {"blocks.0.mlp.fc1": MASK}, (8, 16))
    start = {name: tensor.clone() for name, tensor in tiny_vit.state_dict().items()}

    def trainer_of(
        folder: str = "progress",
        images: int = 20,
        batch_size: int = 8,
        accuracies: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
        before: ClassificationQuality = BEFORE,
        batch_norm: bool = False,
        **settings: Any,
    ) -> Trainer:
        import copy

        model = copy.deepcopy(tiny_vit)
        model.load_state_dict(start)
        if batch_norm:
            model.patch_embed.proj = nn.Sequential(model.patch_embed.proj, nn.BatchNorm2d(32))
        section = FinetuneSection(**{"epochs": 2, "distill": None, "lr": 1e-2, "warmup_epochs": 0, **settings})
        torch.manual_seed(0)
        if section.method != "full":
            adapt(model, {"blocks.0.mlp.fc1": 4}, alpha=8.0)
        choose_trained(model, section)
        augmented = section.augment is not None
        train = Batches(
            SyntheticReader(images, 5, (32, 32)),
            transform_for(model, section.augment),
            batch_size,
            5,
            shuffle=True,
            augmented=augmented,
        )
        objective = Objective(section, 5, None)
        model.eval()
        said = iter(accuracies)
        return Trainer(
            model,
            section,
            train,
            objective,
            lambda: ClassificationQuality(8, next(said), 0.0),
            before,
            tmp_path / folder,
            0,
            CPU,
        )

    return trainer_of


def trained(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.trained.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("mfac", MFAC)])
def test_each_optimizer_lowers_the_loss(make: Callable[..., Trainer], optimizer: str, kind: type) -> None:
    trainer = make(optimizer=optimizer, images=8, epochs=40, lr=3e-2, mfac={"window": 8}, accuracies=range(1, 99))
    assert type(trainer.optimizer) is kind
    trainer.fit(quiet)
    assert trainer.history[-1].loss < trainer.history[0].loss / 2.5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_trained_is_what_the_recipe_says(make: Callable[..., Trainer], method: str) -> None:
    name = "blocks.0.mlp.fc1"
    weights = {f"{name}.lora_a", f"{name}.lora_b"} if method == "lora" else {f"{name}.values"}
    assert make(method=method, also_train=()).trained.keys() == weights
    norms = set(make(method=method, also_train=("norms",)).trained) - weights
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias", "norm.bias"} <= norms
    assert not [n for n in norms if "norm" not in n]
    biases = set(make(method=method, also_train=("biases",)).trained) - weights
    assert {"blocks.0.attn.qkv.bias", "head.bias"} <= biases
    assert not [n for n in biases if "norm" in n or not n.endswith("bias")]
    assert set(make(method=method, also_train=("head",)).trained) - weights == {"head.weight", "head.bias"}


def test_accumulated_batches_step_as_one_batch_does(make: Callable[..., Trainer]) -> None:
    """20 images: steps of 8, 8 and 4, as single batches, or of two batches of 4 (the last step has one of them)."""
    whole, parts = make("a", batch_size=8), make("b", batch_size=4, accumulate=2)
    assert whole.steps_per_epoch == parts.steps_per_epoch == 3
    for trainer in (whole, parts):
        trainer.fit(quiet)
    for name, parameter in trained(whole).items():
        assert relative(parameter, trained(parts)[name]) < 1e-3
    assert [e.loss for e in whole.history] == pytest.approx([e.loss for e in parts.history], rel=1e-4)


def test_a_step_is_that_of_the_clipped_mean_gradient(make: Callable[..., Trainer]) -> None:
    """The first step of AdamW without its memory: the gradient is read off the optimizer's first moment."""
    trainer = make(images=8, epochs=1, clip_norm=0.01)
    model, (x, labels) = trainer.model, next(iter(trainer.train))
    loss = nn.functional.cross_entropy(model(x), labels)
    parameters = list(trainer.trained.values())
    gradients = torch.autograd.grad(loss, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > 0.01
    trainer.fit(quiet)
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in parameters]
    for moment, gradient in zip(moments, gradients, strict=True):
        assert torch.allclose(moment, 0.1 * gradient * 0.01 / norm, rtol=1e-3, atol=1e-9)


def test_the_learning_rate_warms_up_and_follows_a_cosine(make: Callable[..., Trainer]) -> None:
    assert [learning_rate(step, 10, 2) for step in (0, 1, 2, 6, 9)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.5, 0.5 * (1 - 0.9238795)], abs=1e-6
    )
    trainer = make(epochs=2, warmup_epochs=1)
    trainer.fit(quiet)
    steps = [json.loads(line) for line in trainer.log.path.read_text().splitlines()]
    assert [line["lr"] for line in steps if "step" in line] == pytest.approx([1e-2 * learning_rate(k, 6, 3) for k in range(6)])
    assert [line["step"] for line in steps if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps if "step" not in line] == [1, 2]


@pytest.mark.parametrize("warmup", [0, 0.23, 0.5, 1, 1.5, 2.7, 4.01, 9.9, 20.5])
def test_no_warm_up_overshoots_the_rate(warmup: float) -> None:
    """`warmup_epochs` may be a fraction of an epoch, so the warm-up may end between two steps."""
    factors = [learning_rate(step, 10, warmup) for step in range(10)]
    assert all(0 < factor <= 1 for factor in factors)
    warm = math.ceil(warmup)
    assert factors[:warm] == pytest.approx([min(1, (step + 1) / warmup) for step in range(min(warm, 10))])
    falling = factors[warm:]
    assert falling[:1] in ([1.0], []), "the cosine starts at the whole rate"
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(("accuracies", "best"), [((5.0, 9.0, 7.0), 2), ((9.0, 9.0, 2.0), 2), ((1.0, 2.0, 1.5), 0)])
def test_the_best_epoch_is_kept_and_the_pruned_model_is_one(
    make: Callable[..., Trainer], accuracies: tuple[float, ...], best: int
) -> None:
    trainer = make(epochs=3, accuracies=accuracies, before=ClassificationQuality(8, 4.0, 0.0))
    states = [trained(trainer)]
    given = trainer.evaluate

    def evaluate() -> ClassificationQuality:
        states.append(trained(trainer))
        return given()

    trainer.evaluate = evaluate
    trainer.fit(quiet)
    assert trainer.best_epoch == best
    assert same(trained(trainer), states[best])
    assert [e.validation for e in trainer.history] == list(accuracies)
    assert trainer.best_quality.top1 == max(4.0, *accuracies)


def whole(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


STATISTICS = ["patch_embed.proj.1." + name for name in ("running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize(("accuracies", "best"), [((1.0, 2.0, 1.5), 0), ((5.0, 9.0, 7.0), 2)])
def test_the_best_epoch_has_its_statistics_of_batch_norm(
    make: Callable[..., Trainer], accuracies: tuple[float, ...], best: int, ema: float | None
) -> None:
    """They move with every image in training: with those of a later epoch, another model would be kept than was validated."""
    trainer = make(epochs=3, accuracies=accuracies, before=ClassificationQuality(8, 4.0, 0.0), batch_norm=True, ema=ema)
    states = [whole(trainer)]
    given = trainer.evaluate

    def evaluate() -> ClassificationQuality:
        states.append(whole(trainer))
        return given()

    trainer.evaluate = evaluate
    trainer.fit(quiet)
    assert trainer.best_epoch == best
    assert same(whole(trainer), states[best])
    for name in STATISTICS:
        assert len({tuple(state[name].flatten().tolist()) for state in states}) == 4, "training does not move them"


def test_the_moving_average_has_averaged_statistics(make: Callable[..., Trainer]) -> None:
    """As of the parameters; the count of batches is the model's own."""
    trainer = make(epochs=1, ema=0.15, batch_norm=True)
    own, average = [], whole(trainer)
    trainer.fit(lambda done, total, detail: own.append(whole(trainer)))
    for step, after in enumerate(own):
        decay = min(0.15, (1 + step) / (10 + step))
        average |= {name: decay * average[name] + (1 - decay) * after[name] for name in STATISTICS[:2]}
    for name in STATISTICS[:2]:
        assert relative(trainer.model.state_dict()[name], average[name]) < 1e-5
        assert relative(own[-1][name], average[name]) > 1e-4
    assert int(trainer.model.state_dict()[STATISTICS[2]]) == len(own)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_kill_changes_no_statistics_of_batch_norm(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    settings = {"ema": 0.9, "batch_norm": True, "epochs": 2}
    once = make("once", accuracies=(2.0, 1.0), **settings)
    once.fit(quiet)
    steps: list[int] = []

    def kill(done: int, total: int, detail: str) -> None:
        steps.append(done)
        if len(steps) == at:
            raise Killed

    first = make("twice", accuracies=(2.0, 1.0), **settings)
    with pytest.raises(Killed):
        first.fit(kill)
    second = make("twice", accuracies=(2.0, 1.0)[len(first.history) :], **settings)
    second.resume()
    second.fit(quiet)
    assert second.best_epoch == once.best_epoch == 1
    assert same(whole(once), whole(second))


def test_a_checkpoint_without_the_statistics_starts_anew(make: Callable[..., Trainer]) -> None:
    trainer = make(batch_norm=True, epochs=1)
    trainer.best = trained(trainer)
    trainer.folder.mkdir()
    trainer.save()
    with pytest.raises(EnvironmentFault, match="misses tensors of this model") as caught:
        make(batch_norm=True, epochs=1).resume()
    assert "--no-resume" in caught.value.hint


def test_it_stops_once_the_accuracy_is_good_enough(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=4, accuracies=(50.0, 80.0, 90.0, 99.0), target_top1=79.0)
    trainer.fit(quiet)
    assert len(trainer.history) == 2
    assert make("other", target_top1=79.0, before=ClassificationQuality(8, 79.0, 90.0)).finished, "there is nothing to recover"


def test_the_moving_average_is_validated_and_kept(make: Callable[..., Trainer]) -> None:
    """decay = min(ema, (1 + step) / (10 + step)) of the parameters after each step, counted from 0."""
    trainer = make(epochs=1, ema=0.15)
    own, average = [], trained(trainer)
    inside: dict[str, Tensor] = {}

    def evaluate() -> ClassificationQuality:
        inside.update(trained(trainer))
        return ClassificationQuality(8, 50.0, 50.0)

    trainer.evaluate = evaluate
    trainer.fit(lambda done, total, detail: own.append(trained(trainer)))
    for step, after in enumerate(own):
        decay = min(0.15, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * after[name] for name in average}
    for name, expected in average.items():
        assert torch.allclose(inside[name], expected, rtol=1e-4, atol=1e-7)
    assert same(trained(trainer), inside)
    assert not same(inside, own[-1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "mfac"])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_kill_at_any_step_changes_nothing(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, optimizer: str, at: int
) -> None:
    """Bit for bit, with all that draws random numbers: augmentation, mixup, cutmix, erasing; with an average."""
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    augment = Augment(mixup=0.8, cutmix=1.0, erasing=0.5)
    settings = {"optimizer": optimizer, "augment": augment, "ema": 0.9, "epochs": 2, "mfac": {"window": 4}}
    once = make("once", **settings)
    once.fit(quiet)

    def kill(done: int, total: int, detail: str) -> None:
        steps.append(done)
        if len(steps) == at:
            raise Killed

    steps: list[int] = []
    first = make("twice", **settings)
    with pytest.raises(Killed):
        first.fit(kill)
    with first.log.path.open("a") as file:
        file.write('{"step": 99, "epoch": 9}\n{"step": 5, "ep')  # later steps, and a line that was cut
    torch.manual_seed(99)
    second = make("twice", accuracies=(1.0, 2.0)[len(first.history) :], **settings)
    assert second.resume() == (at if at != 3 else 2), "the last step of an epoch is kept with its validation"
    second.fit(quiet)
    assert same(trained(once), trained(second))
    assert once.log.path.read_text().count("\n") == second.log.path.read_text().count("\n") == 8
    assert [e.loss for e in once.history] == [e.loss for e in second.history]


def test_a_damaged_checkpoint_is_an_error_that_says_what_to_do(make: Callable[..., Trainer]) -> None:
    trainer = make()
    assert trainer.resume() == 0
    trainer.folder.mkdir()
    trainer.checkpoint.write_bytes(b"cut short")
    with pytest.raises(EnvironmentFault, match="unreadable checkpoint") as caught:
        trainer.resume()
    assert "--no-resume" in caught.value.hint


def test_a_loss_that_is_no_number_stops_before_it_spoils_anything(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=3)
    broken = trainer.model.blocks[1].attn.proj

    def spoil(done: int, total: int, detail: str) -> None:
        if len(trainer.history) == 1 and done == 2:
            broken.weight.data[0] = float("nan")

    with pytest.raises(CheckFailed, match=r"the loss is nan in step 6 \(epoch 2\), first in blocks\.1\.attn\.proj") as caught:
        trainer.fit(spoil)
    assert caught.value.exit_code == 4
    assert f"the state before is kept in {trainer.checkpoint}" in caught.value.hint
    again = make(epochs=3, accuracies=(2.0, 3.0))
    assert again.resume() == 3
    assert all(bool(parameter.isfinite().all()) for parameter in again.trained.values())


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_gradients_that_are_no_numbers_stop_it_too(make: Callable[..., Trainer], factor: float) -> None:
    trainer = make()
    trainer.trained["blocks.0.mlp.fc1.lora_b"].register_hook(lambda gradient: gradient * factor)
    with pytest.raises(CheckFailed, match=r"gradients are not finite in step 1 .*blocks\.0\.mlp\.fc1\.lora_b"):
        trainer.fit(quiet)


def test_gradients_too_large_for_their_norm_stop_it_too(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.trained["blocks.0.mlp.fc1.lora_b"].register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    with pytest.raises(CheckFailed, match="gradients are not finite in step 1 .*their norm"):
        trainer.fit(quiet)


def test_a_kill_before_the_first_checkpoint_leaves_no_steps_behind(make: Callable[..., Trainer]) -> None:
    def kill(done: int, total: int, detail: str) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        make().fit(kill)
    again = make()
    assert again.resume() == 0
    again.fit(quiet)
    steps = [json.loads(line).get("step") for line in again.log.path.read_text().splitlines()]
    assert [step for step in steps if step] == [1, 2, 3, 4, 5, 6]


def test_norms_and_biases_do_not_decay(make: Callable[..., Trainer]) -> None:
    trainer = make(method="full", weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in trainer.trained.items()} == {
        name: 0.1 if p.ndim > 1 else 0.0 for name, p in trainer.trained.items()
    }
    with pytest.raises(ValueError, match="weight_decay needs method: lora or full"):
        FinetuneSection(weight_decay=0.1)
