"""Where files of the user may be kept, also of a user without a home folder: a uid without an account in a container."""

from __future__ import annotations

import os
import stat
import tempfile
from functools import cache
from pathlib import Path


def has_home() -> bool:
    """Whether there is a home folder to write to, or one that is read-only and in use."""
    home = os.path.expanduser("~")  # "~" where nobody knows it, docker says /
    return os.path.isabs(home) and (os.access(home, os.W_OK) or os.path.isdir(os.path.join(home, ".cache")))


@cache
def private_folder() -> Path:
    """A folder of this user's alone among the temporary ones: the home of one who has none. The same for the whole process."""
    folder = Path(tempfile.gettempdir(), f"lpvit-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        facts = folder.lstat()
        if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o022:  # somebody else's trap
            return Path(tempfile.mkdtemp(prefix="lpvit-"))
    return folder


def cache_folder() -> Path:
    """$LPVIT_CACHE, or lpvit/ of the user's cache folder."""
    if given := os.environ.get("LPVIT_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "lpvit")
    return Path(os.path.expanduser("~") if has_home() else private_folder(), ".cache", "lpvit")
