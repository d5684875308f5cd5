"""The least time that a product can take on a device, by what the device reached in a large product and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpvit_cli.measure.statistics import percentiles
from lpvit_cli.measure.timing import time_interleaved


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in a large product [FLOP/s] and a large copy [byte/s]. Data that stays in a cache may beat it."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Ceilings:
        gpu = device.type == "cuda"
        size, length = (8192, 2**29) if gpu else (1024, 2**25)
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        source, target = torch.ones(2, length, device=device, dtype=dtype)
        subjects = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
        run = time_interleaved(subjects, device=device, rounds=10, warmup_seconds=0.5)
        product_ms, copy_ms = (percentiles(run.subjects[name].samples_ms).p10 for name in subjects)
        return cls(2e3 * size**3 / product_ms, 2e3 * length * source.element_size() / copy_ms)

    def least_ms(self, flops: float, moved_bytes: float) -> float:
        """The roofline (Williams et al., 2009): what takes longer, the arithmetic, or reading and writing everything once."""
        return 1e3 * max(flops / self.flops, moved_bytes / self.bandwidth)
