"""Hooks of mkdocs: links from docs/ to other files of the repository lead to its home; pictures from there are in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PICTURES = "benchmarks/results"
OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """The pictures of benchmark results, which lie outside docs/."""
    for picture in sorted((ROOT / PICTURES).glob("*.svg")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """As it is read in the repository, `](../x)` is beside docs/."""

    def elsewhere(link: re.Match[str]) -> str:
        path, anchor = link[1], link[2] or ""
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {path}: there is no such file")
        if path.startswith(PICTURES) and path.endswith(".svg"):
            return f"]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{path.rstrip('/')}{anchor})"

    return OUTSIDE.sub(elsewhere, markdown)
