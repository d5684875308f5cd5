"""Numbers as people read them."""

from __future__ import annotations

from lpvit_cli.measure.statistics import Ratio


def giga(flops: int) -> str:
    return f"{flops / 1e9:.2f} G" if flops >= 1e8 else f"{flops / 1e6:.1f} M"


def size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def three_digits(value: float) -> str:
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"
