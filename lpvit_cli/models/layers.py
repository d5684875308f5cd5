"""Which layers of a model may be pruned."""

from __future__ import annotations

from torch import nn

from lpvit_cli.errors import UsageError
from lpvit_cli.recipe.prune import Layers


def prunable_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Linear]:
    """nn.Linear modules whose name matches an include glob and no exclude glob."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: module for name, module in linears.items() if layers.match(name)}
    if not chosen:
        raise UsageError(
            f"prune.layers: no linear layer matches {list(layers.include)} without {list(layers.exclude)}",
            f"layers of this model: {', '.join(list(linears)[:4])} ...",
        )
    return chosen
