"""What processes of `helpers.FRESH` have imported before they start: a server imports it once and forks them."""

import timm
import torch

import lpvit_cli.cli
import lpvit_cli.stages.calibrate
import lpvit_cli.stages.finetune

__all__ = ["lpvit_cli", "timm", "torch"]
