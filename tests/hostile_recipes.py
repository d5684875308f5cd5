"""Recipes that nobody means well with: a list by hand, mutations of the shipped ones, and what must hold for each."""

from __future__ import annotations

import random
from pathlib import Path

from hostile import LONGEST, Tally, try_one

from lpvit_cli import Recipe
from lpvit_cli.errors import LpvitError, UsageError
from lpvit_cli.recipe.shipped import shipped_recipes

SHIPPED = shipped_recipes()[0].parent
TOP = "model: {name: vit_tiny_patch16_224}\ndata: {dataset: digits}\n"
NINES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9))
VALUES = {  # by what they are: values for any key
    "date that is none": "2026-99-99",
    "date": "2026-01-01",
    "octal that is none": "!!int 08",
    "empty integer": '!!int ""',
    "empty float": '!!float ""',
    "timestamp that is none": "!!timestamp soon",
    "huge integer": "9" * 100_000,
    "huge hexadecimal": "0x" + "f" * 100_000,
    "sexagesimal": "1" + ":1" * 100_000,
    "huge float": "1" * 100_000 + ".0",
    "more than 64 bits": str(2**64),
    "infinite": ".inf",
    "no number": ".nan",
    "binary": "!!binary aGVsbG8=",
    "bad binary": "!!binary é",
    "set": "!!set {a, b}",
    "ordered": "!!omap [a: 1]",
    "python": "!!python/object/apply:os.system [true]",
    "unknown tag": "!mine x",
    "self": "&a [*a]",
    "self in a mapping": "&a {b: *a}",
    "self in a merge": "&a {<<: *a}",
    "unknown alias": "*nowhere",
    "merge of a number": "{<<: 3}",
    "merge of many": "{a: &a {b: 1}, <<: [" + "*a, " * 1000 + "*a]}",
    "deep list": "[" * 500 + "]" * 500,
    "deep mapping": "{a: " * 500 + "1" + "}" * 500,
    "open brackets": "[" * 100_000,
    "key that is a list": "{? [a] : b}",
    "key that is a mapping": "{? {a: b} : c}",
    "key that is null": "{~: 1}",
    "key that is a number": "{1: 2}",
    "null byte": '"a\\0b"',
    "surrogate": '"\\ud800"',
    "terminal escape": '"\\e[31mred\\a"',
    "raw terminal escape": "\x1b[31mred",
    "line ends": '"a\\nb\\nc\\nd\\ne"',
    "text turned around": '"\\u202egnp.exe"',
    "home of nobody": "~nosuchuser/images",
    "long path": "/" + "x" * 5000,
    "long name": "x" * 5000,
    "deep path": "x/" * 5000,
    "long key": "{" + "k" * 1000 + ": 1}",
    "many keys": "{" + ", ".join(f"k{n}: {n}" for n in range(5_000)) + "}",
    "equals": "=",
    "two documents": "1\n---\n2",
    "parent": "..",
    "nothing": "",
}
KEYS = (
    "name",
    "seed",
    "model",
    "model.name",
    "model.weights",
    "model.kwargs.depth",
    "data.root",
    "data.class_map",
    "prune.block",
)
KEYS += (
    "prune.budget",
    "prune.budget.flops",
    "prune.profile",
    "finetune.rank",
    "finetune.distill.teacher",
    "sweep",
    "export.formats",
)
FILES = {  # whole recipes
    "aliases of aliases": NINES.encode() + TOP.encode(),
    "not UTF-8": b"name: caf\xe9\n" + TOP.encode(),
    "UTF-16": TOP.encode("utf-16"),
    "null bytes": b"\0" * 1000,
    "two MB": b"# " + b"x" * 2**21,
    "a megabyte of items": b"sweep:\n" + b"- 1\n" * 250_000,
    "a megabyte of brackets": b"[" * 10**6,
    "a megabyte of keys": b"".join(b"k%d: 1\n" % n for n in range(90_000)),
    "a megabyte of tags": b"".join(b"%%TAG !%d! tag:x\n" % n for n in range(50_000)) + b"---\n" + TOP.encode(),
    "a megabyte of quotes": b'"' * 10**6,
    "a megabyte of anchors": b"sweep: [" + b"&a 1, " * 160_000 + b"]",
    "empty": b"",
    "a number": b"5",
    "a list": b"- a",
    "many mistakes": TOP.encode() + b"model.label_names: 1\nsweep: [" + b"x, " * 50_000 + b"]\n",
    "merge of itself": TOP.encode() + b"prune: &p {<<: *p}\n",
}


def hostile(folder: Path, keys: tuple[str, ...] = KEYS) -> Tally:
    """All of the list: every value at every one of the keys, in a file and by --set, and every file."""
    tally, path = Tally(), folder / "recipe.yaml"
    for what, content in FILES.items():
        path.write_bytes(content)
        _try(tally, what, path)
    for key in keys:
        *above, last = key.split(".")
        for what, value in VALUES.items():
            indented = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(above))
            path.write_text(
                f"{TOP if above[:1] not in (['model'], ['data']) else ''}{indented}{'  ' * len(above)}{last}: {value}\n"
            )
            _try(tally, f"{what} as {key}", path)
            _try(tally, f"{what} set as {key}", "digits_vit", f"{key}={value}")
    _try(tally, "a key of many parts", "digits_vit", "a." * 5000 + "b=1")
    _try(tally, "no UTF-8 set", "digits_vit", "name=\udce9")
    _try(tally, "a long name", "x" * 5000)
    _try(tally, "a long path", "/x" * 5000)
    return tally


def mutations(folder: Path, seeds: range) -> Tally:
    """As many mutated recipes as there are seeds."""
    tally, path = Tally(), folder / "recipe.yaml"
    texts = [shipped.read_bytes() for shipped in shipped_recipes()]
    for seed in seeds:
        path.write_bytes(mutated(texts, random.Random(seed)))
        _try(tally, f"seed {seed}", path)
    return tally


def mutated(texts: list[bytes], chance: random.Random) -> bytes:
    """One of the texts with one to eight changes."""
    text = chance.choice(texts)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        lines = text.splitlines(keepends=True) or [b"\n"]
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        byte = chance.randrange(len(text) + 1)
        value = chance.choice(list(VALUES.values())).encode("utf-8")
        key = lines[at].partition(b":")[0]
        kind = chance.randrange(12)
        if kind == 0:
            text = text[:byte] + bytes([chance.randrange(256)]) + text[byte + 1 :]
        elif kind == 1:
            text = text[:byte] + text[byte + chance.randrange(1, 40) :]
        elif kind == 2:
            text = text[:byte]
        elif kind == 3:
            text = (
                text[:byte]
                + chance.choice((b"[", b"{", b"&a ", b"*a", b"<<: ", b"!!int ", b"- ", b"? ", b'"', b"\\", b"\0"))
                + text[byte:]
            )
        elif kind == 4:
            lines[at] = lines[other]
            text = b"".join(lines)
        elif kind == 5:
            lines[at], lines[other] = lines[other], lines[at]
            text = b"".join(lines)
        elif kind == 6:
            text = b"".join([*lines[:at], *lines[at : at + 3] * chance.choice((2, 100)), *lines[at:]])
        elif kind == 7:
            lines[at] = b" " * chance.randrange(8) + lines[at].lstrip()
            text = b"".join(lines)
        elif kind == 8:
            text = text + chance.choice(texts)[byte:]
        else:
            lines[at] = key + b": " + value + b"\n"
            text = b"".join(lines)
    return text


def _try(tally: Tally, what: str, recipe: Path | str, *overrides: str) -> None:
    """Load it; it is a recipe, which can be written, or a UsageError that can be read."""

    def use() -> None:
        loaded = Recipe.load(recipe, overrides)
        loaded.to_yaml(), loaded.flat()

    def wrong_with(error: LpvitError) -> list[str]:
        broken = ["no usage error"] * (not isinstance(error, UsageError))
        told = error.message + error.hint
        broken += ["unreadable"] * (not told.isprintable()) + ["long"] * (max(len(error.message), len(error.hint)) > LONGEST)
        broken += ["without a hint"] * (not error.hint)
        broken += ["names no place"] * (not error.message.startswith((f"{recipe}", f"{SHIPPED}", "--set", "no recipe")))
        return broken

    try_one(tally, what, use, wrong_with)
