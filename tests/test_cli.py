"""The command line as scripts and people meet it: exit codes, streams, one JSON document, no torch for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import Result
from rich.table import Table

from lpvit_cli import __version__
from lpvit_cli.cli.console import Console
from lpvit_cli.errors import UsageError
from lpvit_cli.stages import STAGES

Cli = Callable[..., Result]
RECIPE_COMMANDS = [*(stage.command for stage in STAGES), "profile", "run"]
COMMANDS = [*RECIPE_COMMANDS, "evaluate", "predict", "doctor", "recipes"]


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS), ["recipes", "list"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lpvit_cli.cli import app\n"
        "try:\n    app(sys.argv[1:] + ['--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'yaml', 'onnx', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_version_and_every_command_in_help(lpvit: Cli) -> None:
    assert lpvit("--version").out == f"lpvit {__version__}\n"
    text = lpvit("--help").out
    assert all(command in text for command in COMMANDS)
    assert lpvit("frobnicate").code == 2


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_stage_commands_share_their_options(lpvit: Cli, command: str) -> None:
    text = lpvit(command, "--help").out
    options = ("--set", "--output", "-o", "--resume", "--no-resume", "--overwrite", "--device", "--dtype", "--batch-size")
    for option in (*options, "--seed", "--smoke", "--dry-run", "--json", "--quiet", "-q", "--verbose", "-v"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (["run", "digits_vti"], 2, "no recipe 'digits_vti'", "did you mean 'digits_vit'?"),
        (["run", "digits_vit", "--set", "prune.bugdet=1"], 2, "prune.bugdet: unknown key", "did you mean 'budget'?"),
        (["run", "digits_vit", "--set", "prune.min_keep=much"], 2, "prune.min_keep: should be a valid number", "change"),
        (["run", "digits_vit", "--set", "prune"], 2, "not of the form key=value", "for example"),
        (
            ["calibrate", "digits_vit", "--set", "model.name=vit_tiny_patch61_224"],
            2,
            "timm has no model",
            "vit_tiny_patch16_224",
        ),
        (["calibrate", "digits_vit", "--set", "model.weights=gone.safetensors"], 2, "no such weights file", "check the path"),
        (["calibrate", "digits_vit", "--device", "cuda:99"], 3, "device 'cuda:99'", "lpvit doctor"),
        (["calibrate", "digits_vit", "--device", "abacus"], 2, "device 'abacus'", "use auto, cpu"),
        (["calibrate", "digits_vit", "--dtype", "float8"], 2, "dtype", "change dtype"),
        (["calibrate", "deit_small_50", "--set", "model.pretrained=false"], 2, "dataset 'folder' needs a place", "data.root"),
        (["prune", "digits_vit"], 2, "nothing from `calibrate` there yet", "run: lpvit calibrate digits_vit"),
        (["run", "digits_vit", "--sweep", "0.5"], 2, "--sweep is an option of prune", "lpvit prune RECIPE --sweep"),
        (["bench", "digits_vit"], 2, "nothing from `prune` there yet", "run: lpvit prune digits_vit"),
        (["recipes", "show", "digits_vit", "--set", "seed=1"], 2, "--set is an option of validate", "recipes validate RECIPE"),
        (["bench", "digits_vit", "--compare", "a", "b"], 2, "--compare reads two reports", "leave one of the two out"),
        (["run", "digits_vit", "--set", "target.precision=int8"], 2, "int8 needs runtime: onnxruntime", "target"),
        (["evaluate", "runs/none"], 2, "runs/none: no such model folder or file", "timm name"),
        (["evaluate", "vit_tiny_patch61_224"], 2, "timm has no model", "vit_tiny_patch16_224"),
        (["evaluate", "."], 2, "no config.json", "give a model folder"),
        (["predict", "runs/none/model.onnx", "x.png"], 2, "no such model folder or file", "runs/NAME"),
        (["recipes", "show", "digits"], 2, "no recipe 'digits'", "digits_vit"),
        (["recipes", "validate", "none.yaml"], 2, "no recipe 'none.yaml'", "shipped recipes: deit_base_50"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(lpvit: Cli, arguments: list[str], code: int, message: str, hint: str) -> None:
    result = lpvit(*arguments)
    assert result.code == code, result.err
    assert message in result.err
    assert hint in result.err
    assert result.out == ""
    assert len(result.err.strip().splitlines()) <= 4, "a stage's name, then one to three lines"
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.block=[2048,32]", "2048x32 is larger than layer blocks.0.attn.qkv (720x240, out x in)"),
        ("prune.budget.sparsity=0.96", "sparsity 0.96 cannot be reached: with min_keep 0.25 it can be from 0 to 0.75"),
        ("prune.budget.flops=0.01", "flops 0.01 cannot be reached: with min_keep 0.25 it can be from 0.28"),
        ("prune.layers.include=[nothing.*]", "no linear layer matches"),
    ],
)
def test_impossible_pruning_leaves_the_calibration_and_nothing_else(lpvit: Cli, change: str, message: str) -> None:
    calibration = ["digits_vit", "-o", "run", "--set", "calibrate.images=8", "-q", "--set", "data.val_images=8"]
    layers = ["--set", change] if "layers" in change else []
    result = lpvit("calibrate", *calibration, *layers)
    if not layers:
        assert result.code == 0, result.err
        result = lpvit("prune", *calibration, "--set", "prune.min_keep=0.25", "--set", change)
    assert result.code == 2
    assert message in result.err
    assert {p.name for p in Path("run").iterdir()} <= {".lock", "recipe.yaml", "calibration"}


def test_errors_are_json_too(lpvit: Cli) -> None:
    result = lpvit("run", "digits_vti", "--json")
    assert json.loads(result.out) == {
        "error": {
            "kind": "UsageError",
            "message": "no recipe 'digits_vti': neither a file nor a shipped recipe",
            "hint": "did you mean 'digits_vit'?",
            "exit_code": 2,
        }
    }


def test_a_bug_is_a_traceback_and_exit_code_1(lpvit: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("lpvit_cli.commands.doctor.examine", broken)
    result = lpvit("doctor", "--json")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "please report it" in result.err
    assert json.loads(result.out)["error"]["kind"] == "Bug"


def test_causes_are_shown_when_asked_for(lpvit: Cli) -> None:
    Path("w.safetensors").write_bytes(b"nonsense")
    arguments = ["calibrate", "digits_vit", "--set", "model.weights=w.safetensors"]
    quiet, verbose = lpvit(*arguments), lpvit(*arguments, "-v")
    assert (quiet.code, verbose.code) == (3, 3)
    assert "Traceback" not in quiet.err
    assert "SafetensorError" in verbose.err


def test_an_option_of_several_other_commands_is_put_down_to_none(lpvit: Cli) -> None:
    result = lpvit("doctor", "--device", "cuda")
    assert (result.code, "is an option of" in result.err, "--device" in result.err) == (2, False, True)


def test_hints_name_the_recipe_as_the_user_does(lpvit: Cli, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: mine\nmodel: {name: vit_tiny_patch16_224}\ndata: {dataset: digits}\n")
    assert "run: lpvit prune my.yaml" in lpvit("bench", "my.yaml").err


def test_a_rehearsal_keeps_what_is_asked_of_energy(lpvit: Cli) -> None:
    result = lpvit("bench", "digits_vit", "--smoke", "--require-energy", "--allow-mig", "--dry-run", "--json")
    energy = json.loads(result.out)["recipe"]["bench"]["energy"]
    assert (energy["required"], energy["allow_mig"]) == (True, True)


def test_dry_run_writes_nothing(lpvit: Cli, tmp_path: Path) -> None:
    result = lpvit("run", "digits_vit", "--dry-run")
    assert result.code == 0
    assert "# output: runs/digits_vit" in result.out
    assert "sparsity: 0.5" in result.out
    assert list(tmp_path.iterdir()) == []
    document = json.loads(lpvit("run", "digits_vit", "--dry-run", "--json").out)
    assert document["recipe"]["prune"]["min_keep"] == 0
    assert document["stages"] == dict.fromkeys((stage.command for stage in STAGES), "runs")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("calibrate", "calibrate.batch_size"),
        ("bench", "bench.batch_sizes"),
        ("profile", "target.batch_size"),
        ("run", "data.batch_size"),
    ],
)
def test_options_are_recipe_keys(lpvit: Cli, command: str, key: str) -> None:
    options = ["--batch-size", 5, "--seed", 7, "--device", "cpu", "--dtype", "bfloat16"]
    recipe = json.loads(lpvit(command, "digits_vit", *options, "--dry-run", "--json").out)["recipe"]
    section, name = key.split(".")
    assert recipe[section][name] == ([5] if name == "batch_sizes" else 5)
    assert (recipe["seed"], recipe["device"]) == (7, "cpu")
    assert (recipe["target"]["precision"] if command in ("bench", "profile") else recipe["dtype"]) == "bfloat16"


def test_finetune_can_be_left_out(lpvit: Cli) -> None:
    document = json.loads(lpvit("run", "digits_vit", "--set", "finetune=null", "--dry-run", "--json").out)
    assert list(document["stages"]) == ["calibrate", "prune", "bench", "export"]


def test_recipes_are_listed_shown_and_validated(lpvit: Cli) -> None:
    listed = json.loads(lpvit("recipes", "list", "--json").out)
    assert {"deit_base_50", "digits_vit", "dinov2_small_50", "vit_base_hf_50"} <= set(listed)
    assert listed == sorted(listed)
    table = lpvit("recipes", "list").out
    assert all(name in table for name in listed)
    assert lpvit("recipes", "show", "digits_vit").out.startswith("# lpvit run digits_vit\n")
    assert json.loads(lpvit("recipes", "show", "digits_vit", "--json").out)["prune"]["min_keep"] == 0
    assert lpvit("recipes", "validate", "deit_base_70").out == "deit_base_70: valid\n"
    result = lpvit("recipes", "validate", "deit_base_70", "--set", "prune.blocks=1", "--json")
    assert (result.code, json.loads(result.out)["error"]["hint"]) == (2, "did you mean 'block'?")


def test_quiet_prints_errors_only(lpvit: Cli) -> None:
    arguments = ["calibrate", "digits_vit", "--set", "calibrate.images=8", "-q"]
    result = lpvit(*arguments)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert lpvit("prune", "digits_vit", "-q").err != ""


@pytest.mark.parametrize(
    ("command", "package", "line"),
    [
        ("calibrate", "sklearn", "pip install scikit-learn"),
        ("export", "onnxruntime", "pip install onnx onnxscript onnxruntime"),
        ("export", "onnxscript", "pip install onnx onnxscript onnxruntime"),
    ],
)
def test_missing_optional_package(
    lpvit: Cli,
    monkeypatch: pytest.MonkeyPatch,
    demo,
    command: str,
    package: str,
    line: str,  # type: ignore[no-untyped-def]
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    extra = ["-o", demo.folder, *demo.options, "--no-resume"] if command == "export" else []
    result = lpvit(command, "digits_vit", *extra)
    assert result.code == 3
    assert f"the package '{package}' is not installed" in result.err
    assert line in result.err


def test_doctor_names_what_is_there_and_how_to_get_what_is_not(lpvit: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpvit_cli.commands.doctor.installed", lambda package: None if package == "matplotlib" else "1.2.3")
    findings = {finding["what"]: finding for finding in json.loads(lpvit("doctor", "--json").out)}
    assert {"lpvit", "torch", "CPU", "triton", "GPU energy (NVML)", "CPU energy (RAPL)", "onnxruntime"} <= findings.keys()
    assert findings["matplotlib"]["ok"] is False
    assert findings["matplotlib"]["remedy"] == "pip install matplotlib"
    table = lpvit("doctor").out
    assert "pip install matplotlib" in table
    assert "1.2.3" in table


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "\x1b]0;title\x07", "a\x9bb", "\u202egnp.exe", "\ud800", "http://me:hush@host/"]
)
def test_nothing_that_is_printed_steers_the_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Class names and the like come from files that somebody else has made."""
    table = Table()
    table.add_column("class")
    table.add_row(text)
    console = Console(json_mode=True)
    console.human(table, f"the class {text}")
    console.note(text)
    console.progress("reading", 1, 1, text)
    with pytest.raises(SystemExit), console.command():
        raise UsageError(f"no class {text}", f"add {text}\nto the file")
    with pytest.raises(SystemExit), console.command():
        raise ValueError(text)
    out, err = capsys.readouterr()
    for printed in (err, json.loads(out.split("}\n{")[0] + "}" if "}\n{" in out else out)["error"]["message"]):
        assert "hush" not in printed
        assert all(letter.isprintable() for letter in printed.replace("\n", ""))


def test_messages_are_of_one_line_and_not_endless() -> None:
    error = UsageError("x" * 5000 + "\nend", "a\nb")
    assert len(error.message) < 1000
    assert error.message.endswith("x end")
    assert error.hint == "a b"
