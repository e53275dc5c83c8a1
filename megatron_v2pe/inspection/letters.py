"""Which installed font has a letter: matplotlib's own first, then any of the system's; for texts of every script."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

NO_FONT = "\u00b7"  # drawn where no font has the letter


@lru_cache(maxsize=1)
def _charmaps() -> tuple[list[str], dict[str, frozenset[int]]]:
    """Paths of fonts in the order they are tried, and the letters of those that were looked into."""
    from matplotlib import font_manager

    own = font_manager.findfont("DejaVu Sans Mono")
    others = sorted({entry.fname for entry in font_manager.fontManager.ttflist} - {own})
    # Fonts made for many letters first; matplotlib's last resort only draws boxes.
    wide = [
        path
        for path in others
        if any(word in Path(path).name for word in ("CJK", "Han", "wqy", "Fallback", "Noto"))
    ]
    rest = [path for path in others if path not in wide and "LastResort" not in path]
    return [own, *wide, *rest], {}


@lru_cache(maxsize=4096)
def font_of(letter: str) -> str | None:
    """Path of a font that has a letter; None where none is installed."""
    from matplotlib import ft2font

    paths, known = _charmaps()
    for path in paths:
        if path not in known:
            try:
                known[path] = frozenset(ft2font.FT2Font(path).get_charmap())
            except (OSError, RuntimeError):  # a font file that FreeType cannot read
                known[path] = frozenset()
        if ord(letter) in known[path]:
            return path
    return None


def drawing_options(letter: str) -> dict[str, Any]:
    """Font of a letter for matplotlib's `text`; a letter of another font than the first is a little smaller."""
    path = font_of(letter)
    own = _charmaps()[0][0]
    if path is None or path == own:
        return {"family": "monospace", "fontsize": 8.5}
    return {"font": Path(path), "fontsize": 7.0}
