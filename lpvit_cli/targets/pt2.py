"""Running a .pt2 file in torch: an exported program, or one compiled ahead of time."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpvit_cli.errors import EnvironmentFault
from lpvit_cli.files import parse_json, reason
from lpvit_cli.targets.base import METADATA_KEY, ExportedModel

EXTRA_FILE = f"{METADATA_KEY}.json"  # of an exported program; a compiled one has it as a string among its metadata
AGAIN = "copy the file again, or export it again with `lpvit export`"
EXPECTED = re.compile(
    r"models/model\.json|data/(weights|constants)/((weight|tensor)_\d+|model_(weights|constants)_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/.+|archive_\w+|byteorder|\.data/\w+"
)
OPERATOR = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.\w+")
SIZE = re.compile(
    r"(\b(Symbol|Integer|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|Min|Max|positive|nonnegative|integer|True|False"
    r"|[su]\d+|\d+)\b|[\s(),='+*/-])*"
)


class TorchProgram(ExportedModel):
    """`model(images [n, 3, H, W]) -> logits [n, classes]` on the CPU, preprocessing in `pretrained_cfg` as in timm.

    torch.export.load unpickles parts of a file and evaluates texts in it, and has no switch against that. So what lpvit never
    writes is refused before: pickled weights and constants, other operators than torch's own, sizes that are no arithmetic.
    A compiled file is machine code, which nobody can check: like any program, open only one that you trust.

    Raises EnvironmentFault when the file is damaged, is not of lpvit's making, or cannot run in this torch or on this CPU.
    """

    def __init__(self, path: Path):
        super().__init__()
        metadata, compiled = _inspect(path)
        self.adopt(path, {METADATA_KEY: metadata})
        said = logging.getLogger("torch.export")
        level = said.level
        said.setLevel(logging.CRITICAL)  # it logs the traceback of what it then raises
        try:  # a bound method: as a submodule, an exported program would refuse eval()
            self.program: Callable[[Tensor], Tensor] = (
                _load_compiled(path) if compiled else torch.export.load(path).module().__call__
            )
        except Exception as error:  # torch raises many kinds: another version's format, another machine's code
            raise EnvironmentFault(
                f"{path}: torch {torch.__version__} cannot load it: {reason(error)}", "export it again with this torch, here"
            ) from error
        finally:
            said.setLevel(level)

    def run(self, images: Tensor) -> Tensor:
        return self.program(images)


def _load_compiled(path: Path) -> Callable[[Tensor], Tensor]:
    from torch._inductor import aoti_load_package

    run: Callable[[Tensor], Tensor] = aoti_load_package(str(path))
    return run


def _inspect(path: Path) -> tuple[str, bool]:
    """What lpvit wrote about the model, and whether the file is compiled. Loads nothing; raises EnvironmentFault."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than it is")  # torch packs without compressing
            damaged = archive.testzip()
            parts = {name.partition("/")[2]: name for name in archive.namelist()}  # they lie in one folder
            texts = {part: archive.read(name).decode() for part, name in parts.items() if part.endswith(".json")}
            sample = archive.read(parts["data/sample_inputs/model.pt"]) if "data/sample_inputs/model.pt" in parts else b""
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise EnvironmentFault(f"{path}: not a readable .pt2 file: {reason(error)}", AGAIN) from error
    if damaged:
        raise EnvironmentFault(f"{path}: damaged: {damaged} does not fit its checksum", AGAIN)
    foreign = EnvironmentFault(
        f"{path}: was not written by lpvit: nothing in it says how to prepare images",
        "use `lpvit export --set export.formats=[pt2]`",
    )
    compiled = next((text for part, text in texts.items() if part.startswith("data/aotinductor/model/")), None)
    try:
        if compiled is not None:
            return parse_json(compiled)[METADATA_KEY], True
        metadata = texts[f"extra/{EXTRA_FILE}"]
        odd = next(_odd_parts(parts, texts, sample), None)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise foreign from error
    if odd:
        raise EnvironmentFault(f"{path}: {odd}: lpvit writes no such thing, and loading it could run any code", AGAIN)
    return metadata, False


def _odd_parts(parts: dict[str, str], texts: dict[str, str], sample: bytes) -> Iterator[str]:
    """What is not as in the exported programs that lpvit writes."""
    yield from (f"holds {part!r}" for part in parts if not EXPECTED.fullmatch(part))
    for kind in ("weights", "constants"):
        for name, payload in parse_json(texts[f"data/{kind}/model_{kind}_config.json"])["config"].items():
            if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                yield f"{name} is pickled"
    try:
        torch.load(io.BytesIO(sample), weights_only=True)
    except Exception:  # whatever it is, torch.export.load would go on and unpickle it
        yield "its sample inputs hold more than tensors"
    graph = parse_json(texts["models/model.json"])
    if graph.get("guards_code"):
        yield "holds Python code"
    for key, value in _entries(graph):
        if key == "target" and isinstance(value, str) and not OPERATOR.fullmatch(value):
            yield f"calls {value!r}"
        if key == "expr_str" and not SIZE.fullmatch(value):
            yield f"has the size {value!r}"


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value in nested JSON."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)
