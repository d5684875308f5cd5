"""LoRA-GA under a mask: adapters that live on the kept blocks only."""

from lpvit_cli.recovery.lora.adapter import load_adapted, save_adapter
from lpvit_cli.recovery.lora.init import kept_gradients, lora_ga_factors
from lpvit_cli.recovery.lora.layers import MaskedLoraLinear, adapt, adapters_of, merge

__all__ = [
    "MaskedLoraLinear",
    "adapt",
    "adapters_of",
    "kept_gradients",
    "load_adapted",
    "lora_ga_factors",
    "merge",
    "save_adapter",
]
