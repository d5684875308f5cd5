"""The command line: parse, call a stage or a command, print. torch is imported when a command runs, never for --help."""

from typing import Any

from lpvit_cli.cli.common import app

from lpvit_cli.cli import models, stages, tools  # isort: skip  (they add their commands)

__all__ = ["app", "main", "models", "stages", "tools"]


def main() -> Any:
    return app()
