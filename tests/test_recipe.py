"""Recipes: every shipped one is valid; every mistake is named with file, line, key, rule and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lpvit_cli import Recipe
from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.shipped import shipped_recipes

MINIMAL = "model: {name: vit_tiny_patch16_224}\ndata: {dataset: digits}\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def problem(tmp_path: Path, text: str, *overrides: str) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        Recipe.load(written(tmp_path, text), overrides)
    assert caught.value.exit_code == 2
    return caught.value.message, caught.value.hint


def test_the_promised_recipes_ship() -> None:
    names = {path.stem for path in shipped_recipes()}
    classifiers = {"digits_vit", "deit_small_50", "deit_base_50", "deit_base_70", "swin_tiny_77", "vit_base_hf_50"}
    assert names == classifiers | {"dinov2_small_50", "dinov2_base_50", "dinov3_base_50", "siglip2_base_50"}


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda p: p.stem)
def test_shipped_recipe(path: Path) -> None:
    recipe = Recipe.load(path.stem)
    assert recipe.name == path.stem
    assert path.read_text().startswith(f"# lpvit run {path.stem}")
    assert recipe.model.weights is None or recipe.model.weights.is_file()
    assert Recipe.load(path) == recipe


def test_resolved_recipe_loads_back(tmp_path: Path) -> None:
    recipe = Recipe.load("digits_vit", ["prune.budget.flops=0.6", "finetune.distill=null"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_frozen_and_named_after_the_file(tmp_path: Path) -> None:
    recipe = Recipe.load(written(tmp_path, MINIMAL))
    assert recipe.name == "mine"
    with pytest.raises(ValidationError):
        recipe.prune.min_keep = 0.5  # type: ignore[misc]


def test_unknown_key_names_file_line_and_nearest_key(tmp_path: Path) -> None:
    message, hint = problem(tmp_path, MINIMAL + "prune:\n  block: [64, 32]\n  bugdet: {flops: 0.5}\n")
    assert message == f"{tmp_path}/mine.yaml:5: prune.bugdet: unknown key"
    assert hint == "did you mean 'budget'?"


def test_unknown_key_without_a_near_one_lists_the_valid_ones(tmp_path: Path) -> None:
    message, hint = problem(tmp_path, MINIMAL + "export:\n  zzz: 1\n")
    assert "mine.yaml:4: export.zzz: unknown key" in message
    assert hint.startswith("valid keys here: formats, form, precision, opset")


def test_an_invalid_item_is_not_called_a_list_too_short(tmp_path: Path) -> None:
    message, _ = problem(tmp_path, MINIMAL + "export: {formats: [ump]}\n")
    assert "'triton-server' or 'hub' (given: ump)" in message
    assert "at least 1 item" not in message
    message, _ = problem(tmp_path, MINIMAL + "export: {formats: []}\n")
    assert "at least 1 item" in message


@pytest.mark.parametrize(
    ("line", "key", "rule"),
    [
        ("prune: {block: [64]}", "prune.block", "a block is two whole numbers above 0"),
        ("prune: {block: [0, 32]}", "prune.block", "a block is two whole numbers above 0"),
        ("prune: {min_keep: lots}", "prune.min_keep", "should be a valid number"),
        ("prune: {beta: high}", "prune.beta", "should be 'auto', or should be a valid number"),
        ("prune: {beta: .inf}", "prune.beta", "finite number"),
        ("prune: {budget: {latency_ms: .inf}}", "prune.budget.latency_ms", "finite number"),
        ("prune: {budget: {flops: 0.5, sparsity: 0.5}}", "prune.budget", "exactly one of flops"),
        (
            "prune: {method: best}",
            "prune.method",
            "should be 'obs', 'mfac', 'fisher', 'lpvit', 'taylor', 'wanda' or 'magnitude'",
        ),
        ("prune: {method: mfac, fisher_images: 0}", "prune.fisher_images", "should be greater than 0"),
        ("prune: {method: mfac, patterns: [heads]}", "prune", "patterns need method: obs"),
        ("calibrate: {images: -1}", "calibrate.images", "greater than 0"),
        ("finetune: {optimizer: sgd}", "finetune.optimizer", "should be 'adamw' or 'mfac'"),
        ("finetune: {mfac: {window: 0}}", "finetune.mfac.window", "should be greater than 0"),
        ("finetune: {mfac: {damping: 0.0}}", "finetune.mfac.damping", "should be greater than 0"),
        ("dtype: int8", "dtype", "should be 'auto', 'float32', 'bfloat16' or 'float16'"),
    ],
)
def test_wrong_values_name_the_line_and_the_rule(tmp_path: Path, line: str, key: str, rule: str) -> None:
    message, hint = problem(tmp_path, MINIMAL + line + "\n")
    assert message.startswith(f"{tmp_path}/mine.yaml:3: {key}: ")
    assert rule in message
    assert hint


def test_missing_key(tmp_path: Path) -> None:
    message, hint = problem(tmp_path, "model: {name: x}\n")
    assert message.endswith("mine.yaml: data: required key is missing")
    assert "--set data=VALUE" in hint


def test_key_given_twice_and_bad_syntax(tmp_path: Path) -> None:
    message, _ = problem(tmp_path, MINIMAL + "seed: 1\nseed: 2\n")
    assert "mine.yaml:4: not valid YAML: key 'seed' is given twice" in message
    message, _ = problem(tmp_path, "model: [unclosed\n")
    assert "not valid YAML" in message
    message, _ = problem(tmp_path, "- a list\n")
    assert "a recipe is a YAML mapping" in message


def test_unknown_name_suggests_a_shipped_recipe() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("digit_vit")
    assert caught.value.hint == "did you mean 'digits_vit'?"


def test_overrides_win_and_errors_name_them(tmp_path: Path) -> None:
    recipe = Recipe.load(
        written(tmp_path, MINIMAL), ["prune.block=[16,8]", "model.kwargs.depth=3", "finetune=null", "target.threads=1"]
    )
    assert recipe.prune.block == (16, 8)
    assert recipe.model.kwargs == {"depth": 3}
    assert recipe.finetune is None
    assert recipe.target.threads == 1
    assert problem(tmp_path, MINIMAL, "seed=-1")[0].startswith("--set seed=-1: seed: should be greater than or equal to 0")
    assert problem(tmp_path, MINIMAL, "prune.blok=1") == (
        "--set prune.blok=1: prune.blok: unknown key",
        "did you mean 'block'?",
    )
    assert "not of the form key=value" in problem(tmp_path, MINIMAL, "prune.block")[0]
    assert problem(tmp_path, MINIMAL, "seed.x=1")[0].startswith("--set seed.x=1: seed: should be a valid integer")
    assert "is a value, not a section" in problem(tmp_path, MINIMAL + "seed: 1\n", "seed.x=1")[0]


def test_naming_one_budget_replaces_the_other() -> None:
    assert Recipe.load("digits_vit", ["prune.budget.flops=0.7"]).prune.budget.model_dump(exclude_none=True) == {"flops": 0.7}


def test_paths_are_relative_to_the_recipe_else_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = written(tmp_path, "model: {name: x}\ndata: {dataset: folder, root: images}\n")
    assert Recipe.load(path).data.root == tmp_path / "images"
    assert Recipe.load(path, ["data.root=other"]).data.root == tmp_path / "here" / "other"


def test_pretrained_and_weights_exclude_each_other(tmp_path: Path) -> None:
    message, _ = problem(tmp_path, "model: {name: x, pretrained: true, weights: a.safetensors}\ndata: {dataset: digits}\n")
    assert "either pretrained: true or weights" in message


def test_a_copy_of_a_shipped_recipe_finds_its_weights(tmp_path: Path) -> None:
    shipped = Recipe.load("digits_vit")
    copied = Recipe.load(written(tmp_path, next(p for p in shipped_recipes() if p.stem == "digits_vit").read_text()))
    assert copied.model.weights == shipped.model.weights
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "digits_vit.safetensors").touch()
    beside = Recipe.load(tmp_path / "mine.yaml")
    assert beside.model.weights == tmp_path / "weights" / "digits_vit.safetensors"


def test_paths_typed_in_a_shell_are_meant_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the shipped recipes have a weights folder of their own
    recipe = Recipe.load("digits_vit", ["data.root=weights", "model.weights=weights/mine.safetensors"])
    assert recipe.data.root == tmp_path / "weights"
    assert recipe.model.weights == tmp_path / "weights" / "mine.safetensors"


@pytest.mark.parametrize("sweep", ["[0.5,1.0]", "[-0.1]"])
def test_a_sweep_holds_budgets(sweep: str) -> None:
    with pytest.raises(UsageError, match="sweep"):
        Recipe.load("digits_vit", [f"sweep={sweep}"])
    assert Recipe.load("digits_vit", ["sweep=[0.5,0.9]"]).sweep == (0.5, 0.9)


@pytest.mark.parametrize(
    ("block", "blocks"),
    [
        ("[64, 32]", ((64, 32),)),
        ("[[64, 32]]", ((64, 32),)),
        ("[[128, 32], [64, 64]]", ((128, 32), (64, 64))),
        ("[[64, 64], [128, 32], [64, 64]]", ((64, 64), (128, 32))),
    ],
)
def test_one_block_shape_or_several(tmp_path: Path, block: str, blocks: tuple[tuple[int, int], ...]) -> None:
    recipe = Recipe.load(written(tmp_path, MINIMAL + f"prune: {{block: {block}}}"))
    assert recipe.prune.blocks == blocks
    assert Recipe.load(written(tmp_path, recipe.to_yaml())) == recipe
    assert recipe.smoke("vit_tiny_patch16_224", {}).prune.block == recipe.prune.block


@pytest.mark.parametrize(
    "block",
    [
        "[0, 32]",
        "[64, -1]",
        "[64, 32, 16]",
        "[64]",
        "[]",
        "[[]]",
        "64",
        "a",
        "null",
        "[1.5, 2]",
        "[true, 32]",
        "[[64, 32], 64]",
        "[64, [64, 32]]",
        "[[64, 32], [0, 1]]",
        "[[64, 32], [1, 2, 3]]",
        "{rows: 64, columns: 32}",
    ],
)
def test_block_shapes_that_are_none(tmp_path: Path, block: str) -> None:
    """One rule, whichever form was meant."""
    message, hint = problem(tmp_path, MINIMAL + f"prune:\n  block: {block}\n")
    rule = "a block is two whole numbers above 0, [output, input] features; several blocks are a list of them"
    assert message.startswith(f"{tmp_path}/mine.yaml:4: prune.block: {rule} (given: ")
    assert hint.startswith("change prune.block")


@pytest.mark.parametrize(
    ("prune", "told"),
    [
        ("{patterns: [neurons], method: lpvit}", "patterns need method: obs"),
        ("{patterns: [balanced], method: magnitude}", "patterns need method: obs"),
        ("{patterns: [neurons], budget: {latency_ms: 3}}", "a profile has no smaller layers"),
        ("{patterns: [balanced, heads], budget: {energy_mj: 3}}", "a profile has no smaller layers"),
        ("{patterns: [rows]}", "should be 'blocks', 'balanced', 'neurons' or 'heads'"),
        ("{budget: {latency_ms: 0}}", "should be greater than 0"),
        ("{budget: {energy_mj: -1}}", "should be greater than 0"),
        ("{budget: {latency_ms: 1, flops: 0.5}}", "give exactly one of flops, sparsity, latency_ms, energy_mj, max_drop"),
        ("{reweigh: -1}", "should be greater than or equal to 0"),
    ],
)
def test_what_pruning_cannot_do(tmp_path: Path, prune: str, told: str) -> None:
    message, _ = problem(tmp_path, MINIMAL + f"prune: {prune}\n")
    assert "mine.yaml:3: prune" in message
    assert told in message


@pytest.mark.parametrize("prune", ["{patterns: [balanced], budget: {latency_ms: 3}}", "{method: lpvit, sequential: true}"])
def test_what_goes_together(tmp_path: Path, prune: str) -> None:
    assert Recipe.load(written(tmp_path, MINIMAL + f"prune: {prune}\n"))


@pytest.mark.parametrize(
    ("overrides", "height"),
    [
        ([], None),
        (["prune.reorder=false"], 64),
        (["prune.reorder=false", "prune.block=[[64,32],[48,16]]"], 192),
        (["prune.reorder=false", "prune.patterns=[heads]"], None),
    ],
)
def test_calibration_gathers_what_pruning_reads(overrides: list[str], height: int | None) -> None:
    assert Recipe.load("digits_vit", ["prune.block=[64,32]", *overrides]).prune.height == height
