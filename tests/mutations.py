"""A file changed at random: its bytes, its JSON, its tensors, a part of an archive."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Iterator
from typing import Any

import onnx

DEEP = '"@deep@"'  # stands in JSON for what is nested deeply
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 10**9, -(10**20), 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../..", "\x1b[31m\nred\n\n\n", "\ud800", "\0", "x" * 5000, "hf-hub:timm/vit", "float16", "module:os:abort"),
    *([], {}, [[]], [1, 2, 3], {"": {}}, [None], "@deep@"),
)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """Bits turned over, a part cut off, left out, made zero or repeated."""
    made = bytearray(content)
    start = chance.randrange(len(made)) if chance.random() < 0.5 else chance.randrange(min(len(made), 2000))
    length = chance.choice([1, 8, 100, 5000])
    match chance.randrange(6):
        case 0:
            del made[start:]
        case 1:
            del made[start : start + length]
        case 2:
            made[start : start + length] = bytes(min(length, len(made) - start))
        case 3:
            made[start:start] = made[start : start + length]
        case 4:
            made[start : start + length] = chance.randbytes(length)
        case _:
            for _ in range(chance.choice([1, 1, 4, 30])):
                made[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
    return bytes(made)


def as_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON document with values, keys or the whole replaced; now and then its bytes."""
    return flipped(content, chance) if chance.random() < 0.2 else _changed(json.loads(content), chance)


def _changed(document: Any, chance: random.Random) -> bytes:
    document = copy.deepcopy(document)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        places = list(_places(document))
        if not places or chance.random() < 0.01:
            document = chance.choice(VALUES)
            continue
        holder, key = chance.choice(places)
        match chance.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[chance.choice(["x", "", "format", "kept", "pretrained", "checkpoint_path", "depth"])] = holder.pop(key)
            case 2:
                other, at = chance.choice(places)
                if at in other if isinstance(other, dict) else at < len(other):
                    holder[key] = copy.deepcopy(other[at])
            case 3 if isinstance(holder[key], int | float):
                holder[key] = chance.choice([-1, 2, 1000, 1e6, 0]) * holder[key] + chance.choice([0, 1, -1])
            case _:
                holder[key] = copy.deepcopy(chance.choice(VALUES))
    text = json.dumps(document)
    depth = chance.choice([150, 900, 100_000])
    return text.replace(DEEP, "[" * depth + "]" * depth).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def as_tensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, or other values: NaN, or bits turned over."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match chance.randrange(4):
        case 0:
            header = _changed(json.loads(header), chance)
        case 1:
            document = json.loads(header)
            one = document[chance.choice([key for key in document if key != "__metadata__"])]
            one["dtype"] = chance.choice(["F16", "BF16", "F64", "I32", "I64", "F8_E4M3", "BOOL", "U8"])
            size = {"F64": 8, "I64": 8, "I32": 4, "F32": 4}.get(one["dtype"], 2 if "16" in one["dtype"] else 1)
            count = (one["data_offsets"][1] - one["data_offsets"][0]) // size
            one["shape"] = chance.choice([[count], [1, count], [count, 1]])
            header = json.dumps(document).encode()
        case 2:
            at = 4 * chance.randrange(len(data) // 4)
            data = data[:at] + chance.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\0" * 4]) + data[at + 4 :]
        case _:
            return flipped(content, chance)
    return len(header).to_bytes(8, "little") + header + data


def as_lines(content: bytes, chance: random.Random) -> bytes:
    lines = content.splitlines()
    at = chance.randrange(len(lines))
    lines[at] = as_json(lines[at], chance)
    return b"\n".join(lines) + b"\n"


def as_onnx(content: bytes, chance: random.Random) -> bytes:
    """Another metadata document, or other bytes."""
    if chance.random() < 0.5:
        return flipped(content, chance)
    model = onnx.load_from_string(content)
    model.metadata_props[0].value = as_json(model.metadata_props[0].value.encode(), chance).decode("utf-8", "ignore")
    return bytes(model.SerializeToString())


def as_archive(content: bytes, chance: random.Random) -> bytes:
    """Another part in a zip file whose checksums are right, or other bytes."""
    if chance.random() < 0.2:
        return flipped(content, chance)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        chosen = chance.choice([name for name in old.namelist() if old.read(name)])
        for name in old.namelist():
            part = old.read(name)
            if name == chosen:
                part = as_json(part, chance) if name.endswith(".json") else flipped(part, chance)
            new.writestr(name, part)
    return made.getvalue()
