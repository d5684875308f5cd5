"""Merged tokens, removed weights, and both: how long files of a ViT take, and what embeddings lose on real photos.

    python scripts/real_vit.py OUT
    lpvit run dinov2_small_50 -o RUN --set tokens.flops=0.5 --set prune.budget.flops=0.29 ...
    python scripts/bench_tokens.py --real OUT --run RUN --output benchmarks/results/tokens_cpu.json

Speed: in every row the dense float32 file and the others take turns in onnxruntime, one session alive at a time. Random weights
and random blocks of 128x64: neither changes how long a file takes. Accuracy: the real DINOv2 ViT-S/14, nothing pruned or
trained; cosine of its embeddings to those of the model that merges nothing, on photos of 224 pixels.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from results import publish
from torch.nn import functional as F

from lpvit_cli import Recipe
from lpvit_cli.data.splits import validation_batches
from lpvit_cli.export.choose import choose_forms
from lpvit_cli.export.graph import dense_graph, save_onnx
from lpvit_cli.export.onnx_file import exported_layers, sparse_graph
from lpvit_cli.measure.timing import Subject, time_in_visits
from lpvit_cli.models.build import build_model
from lpvit_cli.models.flops import count_flops
from lpvit_cli.models.layers import prunable_layers
from lpvit_cli.models.merging import merge_tokens, merging_for
from lpvit_cli.recipe.prune import Layers
from lpvit_cli.recipe.tokens import TokensSection
from lpvit_cli.sparse import layer_tokens, sparsify
from lpvit_cli.targets.onnxruntime import session
from lpvit_cli.tasks.base import outputs_of
from lpvit_cli.tokens.merge import TokenMerge

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-S/14, 224 px": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "ViT-S/14, 518 px": ("vit_small_patch14_dinov2", {}),
    "DeiT-B": ("deit_base_patch16_224", {}),
}
BLOCK, VISITS, SAMPLES, CPU = (128, 64), 3, 4, torch.device("cpu")
BASE = "dense float32"


@dataclass(frozen=True)
class Case:
    """`tokens`: the FLOPs that merging leaves of the dense ones; `removed`: the share of the blocks that are gone."""

    tokens: float = 1.0
    removed: float = 0.0
    precision: str = "float32"

    def __str__(self) -> str:
        tokens = f"tokens {self.tokens:.0%}" if self.tokens < 1 else ""
        weights = f"weights {1 - self.removed:.0%}" if self.removed else ""
        return f"{' + '.join(filter(None, (tokens, weights))) or 'dense'} {self.precision}"


BOTH = tuple(Case(tokens, 0.5, precision) for precision in ("float32", "int8") for tokens in (1.0, 0.5))
AS_LPVIT = tuple(Case(0.5, 0.46, precision) for precision in ("float32", "int8"))  # 29 % of the FLOPs, attention counted
CASES: dict[str, tuple[Case, ...]] = {
    "ViT-S/14, 224 px": (Case(0.7), Case(0.5), Case(precision="int8"), Case(0.5, precision="int8"), *BOTH),
    "ViT-S/14, 518 px": (Case(0.5), Case(0.3)),
    "DeiT-B": (Case(0.7), Case(0.5), Case(precision="int8"), *AS_LPVIT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="what scripts/real_vit.py wrote; without it only speed is measured")
    parser.add_argument("--run", type=Path, help="a run folder of dinov2_small_50 with tokens, pruned and recovered")
    parser.add_argument("--models", nargs="*", default=list(CASES), choices=list(CASES), metavar="MODEL")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {
        "cosine": accuracy(args.real) if args.real else None,
        "run": of_run(args.run) if args.run else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        found["merge_us"] = merge_us(Path(folder), args.threads)
        print(f"one merge at 257 tokens of 384: {found['merge_us']:.0f} us", flush=True)
        rows = [row for name in args.models for row in speeds(name, Path(folder), args.threads)]
    publish("bench_tokens", ("torch", "timm", "onnxruntime"), args.output, threads=args.threads, **found, rows=rows)


def accuracy(out: Path) -> list[dict[str, Any]]:
    """Of merging alone."""
    facts = [f"model.weights={out / 'dinov2_vits14.safetensors'}", "model.pretrained=false", f"data.root={out / 'photos'}"]
    recipe = Recipe.load("dinov2_small_50", [*facts, "data.workers=0"])
    dense = build_model(recipe.model, recipe.task, recipe.features)
    images = validation_batches(recipe.data, dense)
    expected, rows = outputs_of(dense, images, CPU), []
    for share in (0.7, 0.5, 0.3):
        merging = merging_for(dense, TokensSection(flops=share))
        cosine = F.cosine_similarity(outputs_of(merge_tokens(dense, merging), images, CPU), expected)
        row = {"flops": share, "fraction": merging.fraction, "cosine": float(cosine.mean()), "median": float(cosine.median())}
        row |= {"worst_5_percent": float(cosine.quantile(0.05)), "images": len(cosine)}
        print(f"tokens at {share:.0%} of the FLOPs: cosine {row['cosine']:.4f}, median {row['median']:.4f}", flush=True)
        rows.append(row)
    return rows


def of_run(folder: Path) -> dict[str, Any]:
    """Qualities by the reports of a run: of merging alone, of pruning alone, of both, and after recovery."""
    pruned = json.loads((folder / "pruned" / "report.json").read_text())
    merged, recovered = pruned["merged"], json.loads((folder / "finetuned" / "report.json").read_text())
    flops = {"flops": pruned["flops"] / pruned["flops_dense"], "flops_merged": merged["flops"] / pruned["flops_dense"]}
    qualities = {"tokens": merged["quality"], "weights": merged["quality_unmerged"], "both": pruned["quality"]}
    cosines = {name: quality["cosine"] for name, quality in (qualities | {"recovered": recovered["quality"]}).items()}
    return flops | {"kept": pruned["linear_kept_fraction"], "epochs": len(recovered["history"]), "cosine": cosines}


def merge_us(folder: Path, threads: int) -> float:
    """Microseconds of one merge of 257 tokens, as a file of its own."""

    class Merge(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge, self.pretrained_cfg = TokenMerge(1, 0.23), {"input_size": (257, 384)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            merged, size, _ = self.merge(x, x[..., :1].square() + 1)
            return merged + size

    path = folder / "merge.onnx"
    save_onnx(dense_graph(Merge(), 20, example=torch.zeros(1, 257, 384)), path, {})
    x = np.random.default_rng(0).standard_normal((1, 257, 384), dtype=np.float32)
    opened = {"merge": partial(opened_file, path, threads, x)}
    timing = time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=threads)
    return 1e3 * timing.subjects["merge"].median_ms


def speeds(name: str, folder: Path, threads: int) -> list[dict[str, Any]]:
    """A row for each case of a model."""
    architecture, kwargs = MODELS[name]
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, **kwargs).eval()
    size = kwargs.get("img_size", model.pretrained_cfg["input_size"][1])
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
    paths = {BASE: folder / "dense.onnx"}
    save_onnx(dense_graph(model, 20), paths[BASE], {})
    flops, dense = {}, count_flops(model, ()).total
    for case in CASES[name]:
        made = case_of(model, case)
        flops[str(case)] = count_flops(made, ()).total / dense
        layers = exported_layers(made, case.precision, "auto", Layers().match)
        choices = choose_forms(layers, layer_tokens(made, layers), threads, lambda *_: None)
        paths[str(case)] = folder / f"{len(paths)}.onnx"
        save_onnx(sparse_graph(made, layers, choices, 20, case.precision), paths[str(case)], {})
    x = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    opened = {case: partial(opened_file, path, threads, x) for case, path in paths.items()}
    timing = time_in_visits(opened, visits=VISITS, samples=SAMPLES, threads=threads)
    rows = []
    for case in paths:
        ratio = timing.ratio(BASE, case)
        row = {"model": name, "file": case, "flops": flops.get(case, 1.0), "ms": timing.subjects[case].median_ms}
        rows.append(row | {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "foreign_load": timing.foreign_load})
        print(f"{name:18} {case:32} {row['flops']:5.2f} {row['ms']:8.2f} ms  {ratio.value:.2f}x", flush=True)
    return rows


def case_of(model: Any, case: Case) -> Any:
    """A copy of the model, as the case wants it."""
    made = merge_tokens(copy.deepcopy(model), merging_for(model, TokensSection(flops=case.tokens)) if case.tokens < 1 else None)
    if case.removed:
        generator, masks = torch.Generator().manual_seed(0), {}
        for name, linear in prunable_layers(made, Layers()).items():
            grid = [-(-size // side) for size, side in zip(linear.weight.shape, BLOCK, strict=True)]
            masks[name] = torch.rand(grid, generator=generator) >= case.removed
        sparsify(made, masks, BLOCK)
    return made


def opened_file(path: Path, threads: int, x: Any) -> Subject:
    return partial(session(path, threads).run, None, {"images": x})


if __name__ == "__main__":
    main()
