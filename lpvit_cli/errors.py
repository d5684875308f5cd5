"""The errors a user can meet. Each knows its exit code and ends in what to do; anything else is a bug."""


class LpvitError(Exception):
    """A known error: one line that states rule and value, one that says what to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint


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


def require(*modules: str, install: str = "") -> None:
    """Raise unless optional packages can be imported, naming the missing one and the line that installs it (and its kin)."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise EnvironmentFault(f"the package {module!r} is not installed", f"pip install {install or ' '.join(modules)}")
