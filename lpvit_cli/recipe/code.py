"""Code that a recipe names (`module:package.module:function`): the only code besides lpvit's own that a model may bring.

Whoever loads a recipe allows the function that it names, for this process. A model folder allows nothing: it is data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TRUST = "LPVIT_TRUST_MODULES"  # in the environment, 1: model folders of this process may name any function
_allowed: set[str] = set()


def allow_code(path: str, folder: Path | None = None) -> None:
    """`path`: package.module:function. Modules in the recipe's `folder` can be imported too, after all installed ones."""
    _allowed.add(path)
    if folder is None:
        return
    package = path.partition(":")[0].partition(".")[0]
    beside = os.path.isfile(folder / f"{package}.py") or os.path.isdir(folder / package)  # False for any name, however long
    if package.isidentifier() and beside and str(folder) not in sys.path:
        sys.path.append(str(folder))


def is_allowed(path: str) -> bool:
    """Whether a recipe of this process names the function, or the environment trusts every folder."""
    return path in _allowed or os.environ.get(TRUST) == "1"
