"""Reports made by hand, as large as those of a ViT-B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from made_times import FACTORS, NVML, energy_run, timed

from lpvit_cli.bench.results import BatchBench, Change, LayerBench, LayersBench
from lpvit_cli.export.results import ExportedFile, ExportedLayer, ExportSpeed, FreeForm, Parity
from lpvit_cli.measure.energy.power import Work
from lpvit_cli.measure.energy.run import EnergyRun, Trace, Window
from lpvit_cli.measure.profile import DeviceProfile, LayerProfile, SparseProfile
from lpvit_cli.measure.statistics import Ratio
from lpvit_cli.measure.timing import Timing, TimingRun
from lpvit_cli.recovery.history import Epoch
from lpvit_cli.report.schema import (
    BenchReport,
    CalibrateReport,
    CompareReport,
    EvaluateReport,
    ExportReport,
    FinetuneReport,
    GradualReport,
    GradualStep,
    LayerReport,
    PredictedPoint,
    Prediction,
    PredictionReport,
    PredictReport,
    ProfileReport,
    PruneReport,
    Report,
    SweepPoint,
    SweepReport,
    TuneReport,
)
from lpvit_cli.targets.tuning import TunedLayers
from lpvit_cli.tasks.quality import ClassificationQuality

FOLDER = Path("runs/deit_base_50/stage")
CPU = "AMD EPYC 9V74 80-Core Processor"
NO_METER = "RAPL: /sys/class/powercap absent (virtual machine?)"
DEAD_METER = "the GPU was lost"
LAYERS = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}  # out, in


def batch_bench(
    batch_size: int, milliseconds: float, energy: EnergyRun | None = None, reasons: tuple[str, ...] = (), note: str = ""
) -> BatchBench:
    timing = TimingRun({name: timed(milliseconds * factor) for name, factor in FACTORS.items()}, threads=2, foreign_load=0.0)
    return BatchBench(
        batch_size=batch_size,
        asked_batch_size=batch_size,
        dtype="float32",
        baseline="dense",
        subject="sparse",
        peak_memory_bytes={"dense": 331 * 2**20, "masked-dense": 331 * 2**20, "sparse": None},
        timing=timing,
        speedup={name: timing.ratio("dense", name) for name in FACTORS if name != "dense"},
        images_per_second={name: 1000 * batch_size / run.median_ms for name, run in timing.subjects.items()},
        verdict=f"batch {batch_size}: sparse is 1.33x faster than dense PyTorch (95 % interval 1.33 to 1.33){note}",
        energy=energy,
        energy_reasons=list(reasons),
    )


def replace_timing(batch: BatchBench, **timings: Timing) -> BatchBench:
    """`timings` by subject; `_` in a name stands for `-`."""
    named = {name.replace("_", "-"): timing for name, timing in timings.items()}
    return batch.model_copy(update={"timing": replace(batch.timing, subjects=batch.timing.subjects | named)})


def bench(*batches: BatchBench, **changes: Any) -> BenchReport:
    """Batches of 1 and 64 images; seconds a call, as a ViT-B takes on a CPU."""
    made = batches or (batch_bench(1, 81.37, reasons=(NO_METER,)), batch_bench(64, 5234.56, reasons=(NO_METER,)))
    facts: dict[str, Any] = {
        "device": CPU,
        "model": "finetuned",
        "threads": 2,
        "machine": {"cpu": CPU, "cores": 2, "system": "Linux", "python": "3.12.3"},
        "versions": {"lpvit": "0.1.0", "torch": "2.7.0", "timm": "1.0.15", "triton": None},
        "flops_dense": 35_127_656_448,
        "flops": 17_563_828_224,
        "batches": list(made),
    }
    return BenchReport(**facts | changes)


def measured_bench() -> BenchReport:
    return bench(batch_bench(1, 8.1, energy_run(1.2345)), batch_bench(128, 61.9, energy_run(0.2468)))


def traced_bench() -> BenchReport:
    """One batch with all that a bench can hold: a power trace with its windows, and the layers."""
    energy, names = energy_run(1.2345), list(FACTORS)
    subjects = {}
    for place, name in enumerate(names):
        begins = [10.0 + 4 * (trial * len(names) + place) for trial in range(8)]
        windows = [Window(begin + 1, begin + 3, joules=800.0, images=648) for begin in begins]
        seconds = [begin + 0.05 * k for begin in begins for k in range(60)]
        watts = [412.3 + 10 * (k % 7) for k in range(len(seconds))]
        subjects[name] = replace(
            energy.subjects[name],
            energy_delay_js=energy.subjects[name].joules_per_image * 0.0472,
            peak_w=472.3,
            trace_joules_per_image=energy.subjects[name].joules_per_image * 1.01,
            agreement="good",
            windows=windows,
            trace=Trace(seconds, watts),
        )
    full = replace(energy, subjects=subjects, notes=["sensors err by about 5 %"])
    return bench(batch_bench(128, 61.9, full).model_copy(update={"layers": layers_bench()}))


def layers_bench() -> LayersBench:
    """A block's four linear layers, of which sparse takes half of the time."""
    layers = [
        LayerBench(
            name=f"blocks.0.{name}",
            shape=shape,
            block=(64, 32),
            density=0.5,
            rows=197 * 128,
            runs="triton",
            ms=2.0,
            ms_dense=4.0,
            share=0.2,
            tflops=123.4,
            roofline=0.62,
        )
        for name, shape in LAYERS.items()
    ]
    return LayersBench(total_ms=10.0, total_ms_dense=19.0, peak_tflops=750.0, bandwidth_gb_s=2900.0, layers=layers)


def layer(name: str, out: int, features: int) -> LayerReport:
    rows, columns = out // 64, features // 32
    kept_map = ["#" * (columns // 2) + "." * (columns - columns // 2)] * rows
    dense = 2 * 197 * out * features
    return LayerReport(
        name=name,
        shape=(out, features),
        block=(64, 32),
        blocks=rows * columns,
        kept_blocks=rows * (columns // 2),
        kept_map=kept_map,
        distortion=1.234e-05,
        flops_dense=dense,
        flops=dense // 2,
        energy_uj_dense=4123.4,
        energy_uj=2061.7,
    )


def deit_base_layers(depth: int = 12) -> list[LayerReport]:
    return [layer(f"blocks.{n}.{name}", *shape) for n in range(depth) for name, shape in LAYERS.items()]


def prune(**changes: Any) -> PruneReport:
    facts: dict[str, Any] = {
        "device": CPU,
        "method": "lpvit",
        "beta": 0.25,
        "layers": deit_base_layers(),
        "flops_dense": 35_127_656_448,
        "flops": 17_563_828_224,
        "linear_kept_fraction": 0.4876,
        "bytes_dense": 346_000_000,
        "bytes": 181_000_000,
        "quality_dense": ClassificationQuality(50_000, 81.83, 95.61),
        "quality": ClassificationQuality(50_000, 74.29, 91.52),
        "skipped_images": 3,
    }
    return PruneReport(**facts | changes)


def finetune(**changes: Any) -> FinetuneReport:
    facts: dict[str, Any] = {
        "device": CPU,
        "method": "lora_ga",
        "rank": 16,
        "optimizer_bytes": 21_233_664,
        "processes": 1,
        "best_epoch": 2,
        "trainable_parameters": 2_654_208,
        "all_parameters": 86_567_656,
        "quality_dense": ClassificationQuality(50_000, 81.83, 95.61),
        "quality_pruned": ClassificationQuality(50_000, 74.29, 91.52),
        "quality": ClassificationQuality(50_000, 80.47, 94.98),
        "history": [
            Epoch(epoch=k, loss=1.0 / k, top1=70.0 + k, validation=71.0 + k, images_per_second=812.5) for k in (1, 2, 3)
        ],
        "skipped_images": 0,
    }
    return FinetuneReport(**facts | changes)


def gradual() -> GradualReport:
    """Half and then seven tenths removed; half a point lost in the end."""
    steps = []
    for budget, top1 in {0.5: 81.83, 0.7: 81.33}.items():
        pruned = prune(quality=ClassificationQuality(50_000, top1 - 20, 91.52), linear_kept_fraction=1 - budget)
        recovered = finetune(quality=ClassificationQuality(50_000, top1, 95.0))
        folder = "." if budget == 0.7 else f"{budget:g}"
        steps.append(GradualStep(budget=budget, folder=folder, pruned=pruned, recovered=recovered))
    return GradualReport(device=CPU, kind="sparsity", steps=steps)


def export(**changes: Any) -> ExportReport:
    parity = [
        Parity(batch_size=1, relative_error=3.21e-7, agreement=1.0, agreement_but_ties=1.0),
        Parity(batch_size=8, relative_error=4.56e-7, agreement=0.875, agreement_but_ties=1.0),
    ]
    names = {"dense": "dense float32 in onnxruntime", "int8": "dense int8 in onnxruntime", "vino": "dense float32 in OpenVINO"}
    times = {"dense": timed(3.0), "int8": timed(1.5), "vino": timed(2.4), "model.onnx": timed(2.0)}
    pair = TimingRun(times, threads=2, foreign_load=0.0)
    lossy, dense = ClassificationQuality(256, 70.12, 90.0), ClassificationQuality(256, 81.83, 95.61)
    free = [
        FreeForm(
            name=name,
            subject=subject,
            median_ms=times[subject].median_ms,
            speedup=pair.ratio(subject, "model.onnx"),
            quality=lossy if subject == "int8" else dense,
            counts=subject != "int8",
        )
        for subject, name in names.items()
    ]
    speed = ExportSpeed(
        threads=2,
        batch_size=1,
        timing=pair,
        speedup=Ratio(1.5, 1.4, 1.6),
        free=free,
        best_free=names["vino"],
        speedup_over_best_free=Ratio(1.2, 1.2, 1.2),
        verdict="model.onnx is 1.20x faster",
    )
    layers = [
        ExportedLayer(name=f"blocks.{i}", shape=(64, 32), block=(16, 16), density=0.5, form=form, times_us={"rows": 1.0})
        for i, form in enumerate(("rows", "dense", "rows"))
    ]
    file = ExportedFile(
        format="onnx",
        file="model.onnx",
        bytes=103_870_370,
        bytes_dense=346_234_567,
        parity=parity,
        quality=ClassificationQuality(256, 80.47, 94.98),
        layers=layers,
        speed=speed,
    )
    facts: dict[str, Any] = {
        "device": CPU,
        "model": "finetuned",
        "precision": "float32",
        "quality_model": ClassificationQuality(256, 80.5, 94.98),
        "files": [file, ExportedFile(format="torch", file="model.safetensors", bytes=2**20)],
        "versions": {"onnx": "1.18.0", "onnxruntime": None},
    }
    return ExportReport(**facts | changes)


def evaluate(**changes: Any) -> EvaluateReport:
    facts: dict[str, Any] = {"device": CPU, "model": "runs/a/pruned", "dataset": "folder/imagenet", "skipped_images": 2}
    return EvaluateReport(**facts | {"quality": ClassificationQuality(49_998, 74.29, 91.52)} | changes)


def predict(image: str = "cat.jpg", names: list[str] | None = None) -> PredictReport:
    prediction = Prediction(image=image, classes=[281, 285, 282], names=names, probabilities=[0.8125, 0.125, 0.0625])
    return PredictReport(device=CPU, model="runs/a/pruned", predictions=[prediction])


def profile(metered: bool = False) -> ProfileReport:
    """A ViT-B's layers, of which the smallest is never faster when sparse, and the next one always."""
    kept = [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    layers = []
    for (out, columns), dense_ms in {(768, 768): 0.123, (2304, 768): 123.4, (3072, 768): 7.89}.items():
        ms = [dense_ms * (2 + share if out == 768 else share if out == 2304 else 2 * share) for share in kept]
        sparse = SparseProfile(block=(128, 32), kept=kept, ms=ms, mj=[40 * one for one in ms] if metered else None)
        facts: dict[str, Any] = {"shape": (out, columns), "rows": 12608, "bias": True, "names": ["a"] * 12, "sparse": [sparse]}
        layers.append(LayerProfile(dense_ms=dense_ms, dense_mj=40 * dense_ms if metered else None, **facts))
    made = DeviceProfile(
        device=CPU,
        dtype="float32",
        threads=2,
        model="deit_base_patch16_224.fb_in1k",
        batch_size=64,
        provenance={},
        model_ms=5234.5,
        model_mj=209_380 if metered else None,
        model_work=Work(macs=64 * 17_582_740_224, moved_bytes=4_200_000_000),
        energy_source=NVML if metered else None,
        energy_reasons=[] if metered else [NO_METER],
        layers=layers,
    )
    return ProfileReport(device=CPU, profile=made)


def calibrate() -> CalibrateReport:
    return CalibrateReport(device=CPU, images=1024, gradient="empirical", layers=48, statistics_bytes=5 * 2**19)


def sweep(profiled: bool = False) -> SweepReport:
    speed = {0.5: Ratio(1.63, 1.58, 1.71), 0.7: Ratio(2.41, 2.33, 2.52)}
    points = []
    for (budget, top1), ratio in zip({0.5: 80.12, 0.7: 74.29}.items(), speed.values(), strict=True):
        report = prune(quality=ClassificationQuality(50_000, top1, 91.52))
        if profiled:
            report = report.model_copy(update={"latency_ms_dense": 82.0, "latency_ms": 82.0 / ratio.low})
        points.append(
            SweepPoint(budget=budget, folder=f"{budget:g}", report=report, latency_ms=81.4 / ratio.value, speedup=ratio)
        )
    return SweepReport(device=CPU, kind="sparsity", batch_size=8, latency_ms_dense=81.4, points=points)


def prediction() -> PredictionReport:
    point = PredictedPoint(
        budget=0.5,
        kept_fraction=0.488,
        kept_by_layer={"blocks.0.mlp.fc1": 0.488},
        flops=17_600_000_000,
        bytes=180 * 2**20,
        energy_uj=1234.0,
        latency_ms=41.0,
    )
    return PredictionReport(
        device=CPU,
        kind="flops",
        flops_dense=35_100_000_000,
        bytes_dense=330 * 2**20,
        energy_uj_dense=2345.0,
        latency_ms_dense=82.0,
        points=[point, point.model_copy(update={"budget": 0.3, "latency_ms": None})],
        reasons=["latency: no device profile: lpvit profile deit_base_50"],
    )


def tuned() -> TuneReport:
    """Twelve layers of each shape, forward and backward; one layer keeps all of its blocks."""
    layers = []
    for kind in ("forward", "input_gradient", "weight_gradient"):
        for name, shape, density in (
            ("blocks.0.attn.qkv", (2304, 768), 0.31),
            ("layers.2.blocks.10.attn.proj", (768, 768), 1.0),
            ("blocks.11.mlp.fc2", (768, 3072), 0.3),
        ):
            choice, speedup = ("gathered", None) if kind == "weight_gradient" else ("dense", 1.0)
            if name.endswith("fc2"):
                choice = "gathered"
            facts: dict[str, Any] = {"shape": shape, "block": (128, 32), "density": density, "tokens": 12608}
            facts |= {"choice": choice, "times_us": {choice: 1234.5}, "speedup": speedup, "kept_tflops": 0.0801}
            layers.append(TunedLayers(layers=[name] * 12, kind=kind, **facts))
    return TuneReport(device=CPU, model="runs/a", dtype="float32", threads=2, tuned=layers)


def compared() -> CompareReport:
    of = {"dtype": "float32", "batch_size": 128, "subject": "sparse", "what": "ms"}
    change = Change(**of, before=46.4, after=50.1, ratio=Ratio(0.93, 0.91, 0.95), worse=True)
    fine = change.model_copy(
        update={"what": "J/image", "before": 0.93, "after": 0.93, "ratio": Ratio(1, 0.9, 1.1), "worse": False}
    )
    told = {"before": "runs/a", "after": "runs/b", "differences": ["CPU threads: 2 -> 4"], "changes": [change, fine]}
    return CompareReport(device=CPU, verdict="worse: sparse is 1.08x slower at batch 128, float32", **told)


ALL: dict[str, Callable[[], Report]] = {
    "tune": tuned,
    "calibrate": calibrate,
    "prune": prune,
    "finetune": finetune,
    "gradual": gradual,
    "sweep": sweep,
    "sweep with a profile": lambda: sweep(profiled=True),
    "prediction": prediction,
    "bench": bench,
    "bench with energy": measured_bench,
    "bench with everything": traced_bench,
    "compare": compared,
    "profile": profile,
    "profile with energy": lambda: profile(metered=True),
    "export": export,
    "evaluate": evaluate,
    "predict": predict,
    "predict with names": lambda: predict(names=["tabby, tabby cat", "Egyptian cat", "tiger cat"]),
}
