"""All batches of one dtype: subjects in turn, energy where a meter is, layers if asked for."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import partial

import torch

from lpvit_cli.bench.layers import bench_layers
from lpvit_cli.bench.results import BatchBench
from lpvit_cli.bench.subjects import BASELINE, GRAPH, Shelf, Subjects
from lpvit_cli.bench.work import work_of
from lpvit_cli.devices import type_name
from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.measure.energy.run import energy_on
from lpvit_cli.measure.timing import Subject, TimingRun, time_in_visits, time_interleaved, verdict
from lpvit_cli.models.protocol import VisionModel
from lpvit_cli.progress import Progress
from lpvit_cli.recipe.measure import DENSE, PRUNED, BenchSection
from lpvit_cli.sparse import sparse_layers
from lpvit_cli.targets.tuning import run_dense, tune_model

VISITS = 6  # of each subject, where they must be opened and closed
OUT_OF_MEMORY = "can't allocate memory"  # what torch's CPU allocator says, in a plain RuntimeError


@dataclass
class Bench:
    """All batches of one dtype."""

    settings: BenchSection
    subjects: Subjects
    seed: int
    progress: Progress
    batches: list[BatchBench] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measure_all(self) -> None:
        for asked in self.settings.batch_sizes:
            if batch := self._fitting(asked):
                self.batches.append(batch)
        layers = len(sparse_layers(self.sparse))
        dense = {batch.batch_size: len(run_dense(self.sparse, batch.batch_size)) for batch in self.batches}
        if where := ", ".join(f"{count} of {layers} at batch {size}" for size, count in dense.items() if count):
            self.notes.append(f"block-sparse layers that run as dense ones, which is faster here: {where} (see lpvit tune)")

    @property
    def sparse(self) -> VisionModel:
        return self.subjects.models["sparse"]

    def _fitting(self, asked: int) -> BatchBench | None:
        """The batch, or the largest half, quarter ... of it that fits into memory; None where that is measured anyway."""
        size = asked
        while (batch := self._try(size, asked)) is None:
            if size == 1:
                raise EnvironmentFault(
                    f"bench: not even a batch of 1 in {type_name(self.subjects.dtype)} fits into the memory of "
                    f"{self.subjects.device} with {len(self.subjects.models)} models",
                    "bench fewer subjects (bench.subjects), or a smaller dtype (--dtype), or free the device",
                )
            size //= 2
            if size in self.settings.batch_sizes:
                self.notes.append(f"batch {asked} does not fit into memory: left out, as batch {size} is measured anyway")
                return None
        if size < asked:
            self.notes.append(f"batch {asked} does not fit into memory: measured batch {size} instead")
        return batch

    def _try(self, size: int, asked: int) -> BatchBench | None:
        """None: not enough memory. What the failed attempt held is free again when this returns."""
        try:
            return self._measure(size, asked)
        except (torch.OutOfMemoryError, MemoryError):
            pass
        except RuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
        gc.collect()
        if self.subjects.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _measure(self, size: int, asked: int) -> BatchBench:
        """All subjects on the same random images."""
        subjects, device = self.subjects, self.subjects.device
        generator = torch.Generator().manual_seed(self.seed)
        images = torch.randn(size, *subjects.input_size, generator=generator).to(device, subjects.dtype)
        tune_model(self.sparse, [size], ("forward",), self.progress, again=False)
        prepared = subjects.prepare(images)
        self.notes += prepared.notes
        shelf, opened = Shelf(prepared.openers), {}
        if not subjects.sessions:
            opened = {name: opener() for name, opener in prepared.openers.items()}
        timing = self._time(opened, shelf, f"timing batch {size}")
        baseline = BASELINE if BASELINE in prepared.openers else _fastest(timing, DENSE)
        if baseline.endswith("int8"):
            self.notes.append(f"{subjects.labels[baseline]} is the fastest dense one; what it loses, lpvit export measures")
        subject = _fastest(timing, PRUNED)
        speedup = {name: timing.ratio(baseline, name) for name in prepared.openers if name != baseline}
        sentence = verdict(
            subject,
            subjects.labels[baseline],
            speedup[subject],
            timing,
            timing.subjects[subject],
            otherwise=self._below_break_even(subject, size),
        )
        energy, reasons = energy_on(
            device,
            opened or shelf.subjects(),
            size,
            trials=self.settings.energy.trials,
            window_s=self.settings.energy.window_seconds,
            allow_mig=self.settings.energy.allow_mig,
            on_trial=lambda done, total: self.progress(f"energy, batch {size}", done, total, f"trial {done}/{total}"),
        )
        dtype = type_name(subjects.dtype)
        work = {name: work_of(subjects.models[name], images) for name in ("dense", "sparse")}
        return BatchBench(
            batch_size=size,
            asked_batch_size=asked,
            dtype=dtype,
            baseline=baseline,
            subject=subject,
            timing=timing,
            speedup=speedup,
            images_per_second={name: 1000 * size / timed.median_ms for name, timed in timing.subjects.items()},
            peak_memory_bytes=prepared.memory_bytes,
            verdict=f"batch {size}{f', {dtype}' if len(self.settings.dtypes) > 1 else ''}: {sentence}",
            energy=energy,
            energy_reasons=reasons,
            work={name: work[model] for name in prepared.openers if (model := name.removesuffix(GRAPH)) in work},
            layers=bench_layers(subjects.models, images, self.settings.rounds, self.progress) if self.settings.layers else None,
        )

    def _time(self, opened: dict[str, Subject], shelf: Shelf, what: str) -> TimingRun:
        """`opened`: subjects that may live together; empty: one at a time, from the shelf."""
        rounds, warmup_seconds = self.settings.rounds, self.settings.warmup_seconds

        def on_round(done: int, total: int) -> None:
            self.progress(what, done, total, f"round {done}/{total}")

        if opened:
            device = self.subjects.device
            return time_interleaved(opened, device=device, rounds=rounds, warmup_seconds=warmup_seconds, on_round=on_round)
        return time_in_visits(
            {name: partial(shelf.get, name) for name in shelf.openers},
            visits=VISITS,
            samples=-(-rounds // VISITS),
            threads=torch.get_num_threads(),
            warmup_seconds=warmup_seconds / VISITS,
            on_visit=on_round,
        )

    def _below_break_even(self, subject: str, batch_size: int) -> str:
        """Why the zeros do not pay, where that is known."""
        layers, dense = len(sparse_layers(self.sparse)), len(run_dense(self.sparse, batch_size))
        if not subject.startswith("sparse") or not dense:
            return ""
        return f"{dense} of {layers} block-sparse layers are below the break-even sparsity at this batch and run as dense ones"


def _fastest(timing: TimingRun, names: str | tuple[str, ...]) -> str:
    """The subject with the smallest median of samples among those whose name begins so."""
    candidates = [name for name in timing.subjects if name.startswith(names)]
    return min(candidates, key=lambda name: timing.subjects[name].median_ms)
