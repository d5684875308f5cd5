"""What processes that run any stage have imported besides `warm`, where they are many."""

import onnx
import onnxruntime
import onnxscript
from matplotlib import pyplot

import lpvit_cli.export.graph
import lpvit_cli.stages.bench
import lpvit_cli.stages.export
import lpvit_cli.stages.gradual
import lpvit_cli.stages.profile
import lpvit_cli.stages.prune
import lpvit_cli.stages.sweep

__all__ = ["lpvit_cli", "onnx", "onnxruntime", "onnxscript", "pyplot"]
