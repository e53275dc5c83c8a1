"""Values of the user's inside messages: recognisable, and never longer than a line."""

from __future__ import annotations

from typing import Any

_MOST = 100


def clipped(text: str, limit: int) -> str:
    """A sentence without what is in its middle, where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]}... ({len(text):,} characters) ...{text[-limit // 3 :]}"


def shortened(value: Any, limit: int = _MOST) -> str:
    """`repr` of a value that came out of a file, cut in the middle.

    Args:
        value: anything that json can hold.
        limit: most characters of the result, but for the note of the length.
    """
    if isinstance(value, str) and len(value) > limit:
        return f"{value[: limit // 2]!r}... ({len(value):,} characters)"
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}"
