"""What calibration learns about a dense model."""

from lpvit_cli.curvature.collect import collect
from lpvit_cli.curvature.gradients import ImageGradients, single_images
from lpvit_cli.curvature.outputs import TokenWeights, output_moments
from lpvit_cli.curvature.statistics import LayerStatistics, load_statistics, save_statistics

__all__ = [
    "ImageGradients",
    "LayerStatistics",
    "TokenWeights",
    "collect",
    "load_statistics",
    "output_moments",
    "save_statistics",
    "single_images",
]
