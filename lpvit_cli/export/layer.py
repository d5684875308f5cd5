"""A linear layer that is written to a file: its block rows, and the choice of its form by timing. Needs no runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from lpvit_kernels import BlockSparseMatrix
from torch import Tensor
from torch.nn import functional as F

from lpvit_cli.measure.timing import TimingRun
from lpvit_cli.progress import Progress


@dataclass(frozen=True)
class Row:
    """Output features [R] of one block row, or of several that read the same: block columns, factors [C, R], bias [R]."""

    columns: tuple[int, ...]
    blocks: tuple[Tensor, ...]
    bias: Tensor | None

    @property
    def width(self) -> int:
        return self.blocks[0].shape[1]

    def factor(self, width: int) -> Tensor:
        """[k C, R], blocks below each other; a narrower one, at the ragged edge, is filled up with zeros to C = `width`."""
        return torch.cat([F.pad(block, (0, 0, 0, width - len(block))) for block in self.blocks])


@dataclass(frozen=True)
class ExportLayer:
    """What is written; `x_range`: smallest and largest input, for static int8."""

    name: str
    weight: BlockSparseMatrix
    bias: Tensor | None  # [out]
    int8: bool = False
    x_range: tuple[float, float] | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """Block rows in order. One that keeps nothing has a block of zeros."""
        (out, features), (height, width) = self.weight.shape, self.weight.block
        lines: list[list[tuple[int, Tensor]]] = [[] for _ in range(self.weight.grid[0])]
        for (i, j), block in zip(self.weight.places, self.weight.values.detach(), strict=True):
            lines[i].append((j, block[: out - i * height, : features - j * width].T))
        biases = [None] * len(lines) if self.bias is None else self.bias.detach().split(height)
        made = []
        for i, (line, bias) in enumerate(zip(lines, biases, strict=True)):
            line = line or [(0, self.weight.values.new_zeros(min(width, features), min(height, out - i * height)))]
            columns, blocks = zip(*line, strict=True)
            made.append(Row(columns, blocks, bias))
        return made

    @property
    def merged_rows(self) -> list[Row]:
        """Neighbouring block rows that read the same slices as one."""
        made = []
        for columns, rows in groupby(self.rows, key=lambda row: row.columns):
            kin = list(rows)
            blocks = tuple(torch.cat(side_by_side, dim=1) for side_by_side in zip(*(row.blocks for row in kin), strict=True))
            biases = [row.bias for row in kin if row.bias is not None]
            made.append(Row(columns, blocks, torch.cat(biases) if biases else None))
        return made


@dataclass(frozen=True)
class FormChoice:
    """The fastest form of layers that timing cannot tell apart; medians in microseconds, by form."""

    form: str
    times_us: dict[str, float]

    @classmethod
    def fastest(cls, run: TimingRun) -> FormChoice:
        """Of the forms that were timed."""
        times = {form: 1e3 * timed.median_ms for form, timed in run.subjects.items()}
        return cls(min(times, key=times.__getitem__), times)


def choose_by_kind(
    layers: Mapping[str, ExportLayer],
    tokens: Mapping[str, int],
    progress: Progress,
    choose: Callable[[ExportLayer, int], FormChoice],
) -> dict[str, FormChoice]:
    """`choose`(layer, rows of x) for each layer. Layers of equal shape, block and density are timed once."""
    kinds: dict[object, list[str]] = {}
    for name, layer in layers.items():
        kept = round(20 * layer.weight.density)
        kinds.setdefault((layer.weight.shape, layer.weight.block, kept, layer.int8, tokens[name]), []).append(name)
    chosen: dict[str, FormChoice] = {}
    for done, names in enumerate(kinds.values()):
        progress("choosing forms", done, len(kinds), f"{names[0]}, {tokens[names[0]]} tokens")
        choice = choose(layers[names[0]], tokens[names[0]])
        chosen |= dict.fromkeys(names, choice)
    return {name: chosen[name] for name in layers}
