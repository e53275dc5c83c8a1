"""Hooks of the documentation site: README.md and CHANGELOG.md as pages, links between them and docs/ kept alive.

usage: named in mkdocs.yml; run  .venv/bin/mkdocs build --strict
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that live beside docs/, with their links as seen from docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        text = re.sub(r"\[([^\]]+)\]\(LICENSE\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    return files


if __name__ == "__main__":
    sys.stdout.write(__doc__ or "")
