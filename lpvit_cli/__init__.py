"""lpvit: block-prune vision transformers, recover their accuracy, measure speed and joules, export them.

The names below load on first use, so that `lpvit --help` does not pay for torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "load_model"]

if TYPE_CHECKING:
    from lpvit_cli.models.folder import load_model
    from lpvit_cli.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from lpvit_cli.recipe import Recipe

        return Recipe
    if name == "load_model":
        from lpvit_cli.models.folder import load_model

        return load_model
    raise AttributeError(f"module 'lpvit_cli' has no attribute {name!r}")
