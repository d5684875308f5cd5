"""The errors a user can meet. Each knows its exit code and ends in what to do; anything else is a bug."""

import errno
import re

LONGEST = 1000  # characters of a message
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # also what turns text around
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")


def escaped(text: str) -> str:
    """As `text`, with escapes for what could steer a terminal, but for line ends and tabs; without credentials of addresses."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), _CREDENTIALS.sub("", text))


def printable(text: str, longest: int = LONGEST) -> str:
    """One line of at most `longest` characters, which says what `text` says and cannot steer a terminal."""
    line = escaped(" ".join(text.split("\n")))
    return line if len(line) <= longest else f"{line[: longest * 2 // 3]} ... {line[-(longest // 4) :]}"


class LpvitError(Exception):
    """A known error: one line that states rule and value, one that says what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        self.message, self.hint = printable(message), printable(hint)
        super().__init__(self.message)


class UsageError(LpvitError):
    """The command line or the recipe asks for something that does not exist or cannot be done."""

    exit_code = 2


class ForeignImage(UsageError):
    """An image has a label or channels that the model does not know; of several processes only its reader can tell."""


class EnvironmentFault(LpvitError):
    """The machine lacks something: a package, a device, disk space, a readable file."""

    exit_code = 3


class CheckFailed(LpvitError):
    """The work was done, but its result failed a check: parity, an accuracy guard, a filled zero."""

    exit_code = 4


def known(error: BaseException) -> LpvitError | None:
    """What an exception of Python's or torch's means, if it tells of the machine or of what a user has typed; None: a bug."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{printable(str(error.filename), 200)}: {error.strerror}", "give a shorter path")
    if isinstance(error, RuntimeError) and re.match(r"DataLoader (worker \(pid|timed out)", str(error)):
        return EnvironmentFault(
            f"data.workers: a process that decodes images has died or says nothing ({str(error).split('. ')[0]})",
            "memory, /dev/shm or the disk may be too small or slow (lpvit doctor):"
            " --set data.workers=0, or docker run --shm-size=1g; to wait longer: LPVIT_PATIENCE=SECONDS",
        )
    return None


def require(*modules: str, install: str = "") -> None:
    """Raise unless optional packages can be imported, naming the missing one and the line that installs it (and its kin)."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise EnvironmentFault(f"the package {module!r} is not installed", f"pip install {install or ' '.join(modules)}")
