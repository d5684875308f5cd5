"""What calibration learns about a dense model."""

from lpvit_cli.curvature.collect import collect
from lpvit_cli.curvature.statistics import LayerStatistics, load_statistics, save_statistics

__all__ = ["LayerStatistics", "collect", "load_statistics", "save_statistics"]
