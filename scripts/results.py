"""How every benchmark here ends: its result as JSON, in a file and as the last line of stdout."""

import json
from pathlib import Path

from lpvit_cli.machine import provenance


def publish(benchmark: str, packages: tuple[str, ...], output: Path | None, **found: object) -> None:
    """`found` with the benchmark's name, the date, the machine and the versions of `packages`."""
    result = {"benchmark": benchmark, **provenance(*packages), **found}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
