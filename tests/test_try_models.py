"""The matrix of architectures in the documents: every one is there, and what does not work says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import try_models

PAGE = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text()
ROWS = {cells[0]: cells[1:] for cells in re.findall(r"^\| (\S.*?) \|(.*)\|$", PAGE, re.M)}
PROMISED = (
    *(
        "vit",
        "deit",
        "deit3",
        "beit",
        "beitv2",
        "eva02",
        "dinov2",
        "dinov3",
        "siglip",
        "clip",
        "samvit",
        "swin",
        "swinv2",
        "hiera",
    ),
    *("mvitv2", "maxvit", "xcit", "cait", "convit", "volo", "pvt_v2", "twins", "levit", "tiny_vit", "efficientvit", "fastvit"),
    *("naflexvit", "ViTForImageClassification", "ViTModel", "DeiT", "Dinov2", "DINOv3", "SiglipVisionModel", "CLIPVisionModel"),
    *("BeitForImageClassification", "SwinForImageClassification"),
)


def test_the_page_has_every_architecture_that_is_tried() -> None:
    assert len(try_models.sections()) >= 40
    assert [name for name in ROWS if name != "architecture"] == list(try_models.sections())


@pytest.mark.parametrize("family", PROMISED)
def test_what_is_promised_works(family: str) -> None:
    kin = [cells for name, cells in ROWS.items() if family in name]
    assert any(cells[0].split(" | ") and "[" not in "".join(cells) for cells in kin)


def test_what_does_not_work_says_why() -> None:
    numbers = {int(number) for number in re.findall(r"\[(\d+)\]\(#why-not\)", PAGE)}
    reasons = {int(number): text for number, text in re.findall(r"^(\d+)\. (.+)$", PAGE.split("## Why not")[1], re.M)}
    assert numbers == reasons.keys()
    assert not [text for text in reasons.values() if "BUG" in text]


def test_the_table_numbers_each_reason_once() -> None:
    works, refused = dict.fromkeys(try_models.STEPS, try_models.WORKS), {"calibrate": "no linear layers"}
    page = try_models.table({"a": works, "b": refused, "c": refused})
    assert page.count("[1](#why-not)") == 2
    assert page.rstrip().endswith("1. no linear layers")
