"""The page of a bench in a real browser, headless, at a desk's width and at a phone's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from made import deit_base_layers, finetune, prune, traced_bench
from PIL import Image

from lpvit_cli.report.html import write_html
from lpvit_cli.report.pictures import COLORS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

QUIET = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
DESK, PHONE = 1280, 390

# Looks at the page from around it: what is drawn, and whether it is wider than its frame.
PROBE = """<!doctype html><body style="margin: 0">
<iframe src="report.html" style="width: %dpx; height: 6000px; border: 0"></iframe>
<script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const drawn = [...page.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect(), shapes = [...svg.querySelectorAll("path, use, image, rect")];
    return {width: box.width, height: box.height, shapes: shapes.filter(s => s.getBoundingClientRect().width > 0).length};
  });
  const heads = [...page.querySelectorAll("h2")].map(head => head.textContent);
  const result = {drawn, heads, wide: root.scrollWidth, frame: root.clientWidth, text: page.body.innerText};
  document.body.insertAdjacentHTML("beforeend", "<pre id=probe></pre>");
  document.getElementById("probe").textContent = JSON.stringify(result);
};
</script></body>"""


@dataclass
class Browser:
    folder: Path

    def run(self, page: str, *options: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={self.folder / 'profile'}"
        logged = ["--enable-logging=stderr", "--allow-file-access-from-files", "--hide-scrollbars", profile]
        command = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            *QUIET.split(),
            *logged,
            *options,
            f"file://{self.folder / page}",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)

    def probe(self, width: int) -> dict[str, Any]:
        (self.folder / "probe.html").write_text(PROBE % width)
        done = self.run("probe.html", "--dump-dom", "--virtual-time-budget=5000")
        assert console_messages(done.stderr) == []
        found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:]
        result: dict[str, Any] = json.loads(unescape(found[1]))
        return result

    def picture(self, width: int, height: int) -> Image.Image:
        shot = self.folder / "shot.png"
        done = self.run("report.html", f"--window-size={width},{height}", f"--screenshot={shot}")
        assert console_messages(done.stderr) == []
        return Image.open(shot).convert("RGB")


def console_messages(log: str) -> list[str]:
    """What a page said to the console; the browser's own troubles (no bus, no GPU) are not the page's."""
    return [line for line in log.splitlines() if ":CONSOLE" in line or "Uncaught" in line]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    folder = tmp_path_factory.mktemp("page")
    write_html(folder / "report.html", "deit_base_50", traced_bench(), prune(layers=deit_base_layers(2)), finetune())
    return Browser(folder)


def test_errors_of_a_page_would_be_noticed(browser: Browser) -> None:
    (browser.folder / "bad.html").write_text('<img src="missing.png"><script>console.error("no"); nothing.there</script>')
    told = console_messages(browser.run("bad.html", "--dump-dom").stderr)
    assert len(told) >= 2, told


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_page_is_whole_and_fits(browser: Browser, width: int) -> None:
    seen = browser.probe(width)
    assert seen["frame"] == width
    assert seen["wide"] <= width, "tables and pictures scroll within the page, not the page itself"
    assert len(seen["drawn"]) == 5, "latency, power, energy, layers, kept blocks"
    for picture in seen["drawn"]:
        assert picture["width"] > 300
        assert picture["height"] > 50
        assert picture["shapes"] > 20
    assert seen["heads"] == [
        "Model",
        "Latency and memory",
        "Energy",
        "Pictures",
        "Time by layer, batch 128, float32",
        "Layers",
        "Machine",
    ]
    assert seen["text"].index("1.33x faster") < seen["text"].index("Model\n"), "the verdict comes first"


def test_subjects_are_drawn_in_their_colours(browser: Browser) -> None:
    shot = browser.picture(DESK, 5000)
    assert shot.size == (DESK, 5000)
    counted: dict[Any, int] = {color: count for count, color in shot.getcolors(2**24) or []}

    def pixels(*rgb: float) -> int:
        """How many have this colour, to rounding."""
        return sum(n for color, n in counted.items() if all(abs(a - b) <= 2 for a, b in zip(color, rgb, strict=True)))

    for name, color in COLORS.items():
        rgb = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
        assert pixels(*rgb) > 5000, f"{name}: its bars"
        assert pixels(*(255 - 0.15 * (255 - c) for c in rgb)) > 5000, f"{name}: the shade of its windows"
    assert pixels(30, 58, 138) > 50 * DESK, "the head of the page"
    assert pixels(255, 255, 255) > 0.5 * DESK * 5000
