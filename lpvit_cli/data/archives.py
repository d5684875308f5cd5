"""Images in tar files, and in tar files within them: listed once, read from where they lie in the file."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

from lpvit_kernels.home import cache_folder
from pydantic import Field, TypeAdapter

from lpvit_cli.data.classes import natural
from lpvit_cli.data.files import FileReader, image_endings, is_image
from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import digest, replace_text

LARGE = 10 * 2**30  # bytes of an archive whose listing takes minutes: it is kept
LISTINGS = "tars"  # in the cache folder
Bytes = Annotated[int, Field(ge=0)]


class Member(NamedTuple):
    """A file that may be an image."""

    path: str  # in the tar file that it lies in
    folder: str  # that may be its class; "": it lies in none
    start: Bytes  # in the outermost file
    size: Bytes


class TarReader(FileReader):
    """The images in a tar file, or in tar files within it; a class is the folder or tar they lie in."""

    def __init__(self, archive: Path):
        members = _members(archive)
        images = sorted((member for member in members if is_image(member.path)), key=lambda member: natural(member.path))
        others = [member.path for member in members if not is_image(member.path)]
        super().__init__(archive, [member.path for member in images], others)
        self.members = images

    def open(self, index: int) -> BinaryIO:
        member = self.members[index]
        with self.root.open("rb") as file:
            file.seek(member.start)
            return BytesIO(file.read(member.size))

    def folders(self) -> list[str]:
        return [member.folder for member in self.members]


def _members(archive: Path) -> list[Member]:
    facts = archive.stat()
    if facts.st_size <= LARGE:
        return _listed(archive)
    kept = cache_folder() / LISTINGS / f"{digest([str(archive.resolve()), facts.st_size, facts.st_mtime_ns])}.json"
    with suppress(OSError, ValueError, RecursionError):  # there is none, or it is of no use
        return TypeAdapter(list[Member]).validate_json(kept.read_bytes())
    members = _listed(archive)
    with suppress(OSError):  # the next run lists it again
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_text(kept, json.dumps(members))
    return members


def _listed(archive: Path) -> list[Member]:
    try:
        with tarfile.open(archive, "r:") as outer:
            return list(_images_in(outer, "", 0))
    except tarfile.TarError as error:
        raise EnvironmentFault(f"{archive}: not a readable tar file: {error}", "copy or download it again") from error
    except OSError as error:
        raise EnvironmentFault(f"{archive}: cannot be read: {error.strerror}", "check its permissions") from error


def _images_in(tar: tarfile.TarFile, inside: str, start: int) -> Iterator[Member]:
    """`inside`: the name of the tar file, where it lies in another one, from byte `start` on."""
    for member in tar:
        path = member.path.removeprefix("./")
        ending = Path(path).suffix.lower()
        if not member.isfile():
            continue
        if ending == ".tar" and not start:
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _images_in(inner, Path(path).stem, member.offset_data)
        elif ending in image_endings():
            yield Member(path, Path(path).parent.name or inside, start + member.offset_data, member.size)
