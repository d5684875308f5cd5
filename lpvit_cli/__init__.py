"""lpvit: block-prune vision transformers, recover their accuracy, measure speed and joules, export them.

The names below load on first use, so that `lpvit --help` does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"
__all__ = ["Recipe", "__version__", "export_onnx", "load_model", "merge_tokens", "prune", "recover", "sparse_layers"]

if TYPE_CHECKING:
    from lpvit_cli.api import export_onnx, merge_tokens, prune, recover
    from lpvit_cli.models.folder import load_model
    from lpvit_cli.recipe import Recipe
    from lpvit_cli.sparse import sparse_layers

_PLACES = {
    "Recipe": "lpvit_cli.recipe",
    "export_onnx": "lpvit_cli.api",
    "load_model": "lpvit_cli.models.folder",
    "merge_tokens": "lpvit_cli.api",
    "prune": "lpvit_cli.api",
    "recover": "lpvit_cli.api",
    "sparse_layers": "lpvit_cli.sparse",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'lpvit_cli' has no attribute {name!r}")
