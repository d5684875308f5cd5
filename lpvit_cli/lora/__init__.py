"""LoRA-GA under a mask: adapters that live on the kept blocks only."""

from lpvit_cli.lora.layers import MaskedLoraLinear, adapt, merge

__all__ = ["MaskedLoraLinear", "adapt", "merge"]
