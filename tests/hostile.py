"""What one hostile input may take, and a tally of what was tried and what broke a promise."""

from __future__ import annotations

import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lpvit_cli.errors import EnvironmentFault, LpvitError, UsageError

SECONDS, BYTES, LONGEST = 5, 2**30, 1000  # of processor time and of memory for one input; characters of a message


@dataclass
class Tally:
    """How many inputs were tried, how many refused, and those that broke a promise, by promise."""

    tried: int = 0
    refused: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __iadd__(self, other: Tally) -> Tally:
        self.tried, self.refused = self.tried + other.tried, self.refused + other.refused
        self.broken, self.examples = self.broken + other.broken, other.examples | self.examples
        return self


class _TooSlow(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooSlow


def try_one(tally: Tally, what: str, use: Callable[[], object], wrong_with: Callable[[LpvitError], list[str]]) -> None:
    """Use one input within the limits; it is fine, or refused with a message that `wrong_with` finds nothing wrong with."""
    tally.tried += 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    broken = []
    try:
        use()
    except (UsageError, EnvironmentFault) as error:
        tally.refused += 1
        if broken := wrong_with(error):
            what = f"{what}: {error.message[:300]!r}"
    except _TooSlow:
        broken = [f"over {SECONDS} s"]
    except BaseException as error:
        broken, what = [type(error).__name__], f"{what}: {str(error)[:300]!r} {_place(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    broken += ["over 1 GiB"] * (grown * (1 if sys.platform == "darwin" else 1024) > BYTES)
    for kind in broken:
        tally.broken[kind] += 1
        tally.examples.setdefault(kind, what)


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    places = []
    while trace:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " < ".join(reversed(places[-6:]))
