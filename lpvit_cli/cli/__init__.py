"""The command line: parse, call a stage or a command, print. torch is imported when a command runs, never for --help."""

from typing import Any

from lpvit_cli.cli.common import app
from lpvit_cli.machine import settle

from lpvit_cli.cli import stages, models, tools  # isort: skip  (they add their commands, in the order of --help)

__all__ = ["app", "main", "models", "stages", "tools"]


def main() -> Any:
    settle()
    return app()
