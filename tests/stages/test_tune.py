"""tune: what is timed are the layers that run."""

from __future__ import annotations

from pathlib import Path

from helpers import MODELS, masked, random_model

from lpvit_cli.commands.tune import tune_any
from lpvit_cli.models.folder import load_model, save_model
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.trim import trim
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.sparse import sparse_layers, sparsify

BLOCK = (8, 16)


def test_the_layers_of_the_folder_are_tuned_as_they_will_be_loaded(tmp_path: Path) -> None:
    """Trimming is for who runs the model: `load_model` does not trim."""
    model = random_model("vit")
    masks = {n: masked((m.out_features, m.in_features), BLOCK, 0.7)[1] for n, m in prunable_layers(model, Layers()).items()}
    for name, mask in masks.items():
        if name.endswith("fc2"):
            mask[:, 0] = False
    sparsify(model, masks, BLOCK)
    config = {"architecture": MODELS["vit"][0], "kwargs": MODELS["vit"][1], "preprocessing": {"input_size": (3, 32, 32)}}
    save_model(tmp_path, model, config)
    report = tune_any(str(tmp_path), [1], False, 1, "cpu", "float32", lambda *_: None)
    found = {name: one.shape for one in report.tuned for name in one.layers}
    assert found == {name: layer.weight.shape for name, layer in sparse_layers(load_model(tmp_path)).items()}
    assert found != {name: layer.weight.shape for name, layer in sparse_layers(trim(model)).items()}
