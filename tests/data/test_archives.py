"""Large tar files: their listing is kept in lpvit's cache, and holds while the file is the same."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import pytest
from made_images import write_split
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from lpvit_cli.data import archives
from lpvit_cli.data.archives import TarReader


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in folders and in a tar file within, and a cache of its own; every tar file counts as large."""
    monkeypatch.setattr(archives, "LARGE", 0)
    monkeypatch.setenv("LPVIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "inner").mkdir()
    write_split(tmp_path / "inner", "wasp", {"sub": 2}, "tar")
    write_split(tmp_path, "train", {"ant": 3, "bee": 3}, "tar")
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        tar.add(tmp_path / "inner" / "wasp.tar", "in/wasp.tar")
    return tmp_path / "train.tar"


def contents(reader: TarReader) -> list[tuple[str, str, bytes]]:
    return [(reader.paths[at], folder, reader.open(at).read()) for at, folder in enumerate(reader.folders())]


def test_images_are_those_that_timm_finds(archive: Path) -> None:
    theirs = ReaderImageInTar(str(archive))
    names = theirs.class_idx_to_name
    paths = [sample.path.removeprefix("./") for sample, *_ in theirs.samples]
    found = [(path, names[theirs[at][1]], theirs[at][0].read()) for at, path in enumerate(paths)]
    assert sorted(contents(TarReader(archive))) == sorted(found)
    assert len(found) == 8


def test_a_listing_is_kept_while_the_file_is_the_same(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(archive.parent.iterdir())
    first = contents(TarReader(archive))
    (kept,) = (archive.parent / "cache" / "tars").iterdir()
    assert kept.suffix == ".json"
    assert sorted(archive.parent.iterdir()) == sorted([*before, archive.parent / "cache"]), "nothing beside the images"
    monkeypatch.setattr(archives.tarfile, "open", None)
    assert contents(TarReader(archive)) == first
    monkeypatch.undo()
    monkeypatch.setattr(archives, "LARGE", 0)
    monkeypatch.setenv("LPVIT_CACHE", str(archive.parent / "cache"))
    os.utime(archive, (1, 1))
    assert contents(TarReader(archive)) == first
    assert len(list(kept.parent.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"5", b'[["a.png", "ant", -1, 5]]', b"[" * 100_000, b"\xff"])
def test_a_damaged_listing_is_made_again(archive: Path, content: bytes) -> None:
    first = contents(TarReader(archive))
    (kept,) = (archive.parent / "cache" / "tars").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(content)
    assert contents(TarReader(archive)) == first
    assert kept.read_bytes() == whole


def test_no_pickle_is_read_and_no_cache_is_no_harm(archive: Path) -> None:
    (archive.parent / "_train_tarinfos.pickle").write_bytes(pickle.dumps({"tartrees": []}))
    (archive.parent / "cache").write_text("a file")
    assert len(TarReader(archive)) == 8
