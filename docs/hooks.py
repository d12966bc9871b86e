"""What mkdocs does with files outside of docs/: the README, and results.

The README is the site's first page. Markdown and pictures of `benchmarks/` are pages,
too. All other files that pages link to are shown by the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PICTURES = "https://raw.githubusercontent.com/frog-triton/frog-triton/main/"
"""Where the README's pictures are for a package index, which shows no others."""

_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#\s])")


def _formula(source: str, *_: Any, **__: Any) -> str:
    return f'<p class="formula">{convert(source, display="block")}</p>'


def on_config(config: Any) -> None:
    """Fences called math become MathML, which browsers show without a script."""
    fence = {"name": "math", "class": "math", "format": _formula}
    extension = config.mdx_configs.setdefault("pymdownx.superfences", {})
    extension["custom_fences"] = [fence]


def on_files(files: Any, config: Any) -> None:
    """Add the README and the pages and pictures of results."""
    pages = {"index.md": ROOT / "README.md"}
    for path in (ROOT / "benchmarks").rglob("*"):
        if path.suffix in (".md", ".png"):
            pages[path.relative_to(ROOT).as_posix()] = path
    for name, path in pages.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to pages of the site, else to the repository."""
    here = Path(page.file.abs_src_path)
    known = {Path(f.abs_src_path): f.src_uri for f in files if f.abs_src_path}
    start = Path(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        link = match[1]
        base = ROOT if link.startswith(PICTURES) else here.parent
        path = Path(os.path.normpath(base / link.removeprefix(PICTURES)))
        if path in known:
            return os.path.relpath(known[path], start)
        if "://" in link or not path.exists():
            return link  # what leads nowhere, mkdocs reports
        kind = "tree" if path.is_dir() else "blob"
        return f"{config.repo_url}/{kind}/main/{path.relative_to(ROOT).as_posix()}"

    return _LINK.sub(lead, markdown)
