"""Tables as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_GAP = "  "


def text_table(
    header: Sequence[str] | None,
    rows: Iterable[Sequence[str] | None],
    *,
    align: str = "<>",
    indent: str = "",
) -> list[str]:
    """Lines of a table whose columns are as wide as their widest cell.

    Args:
        header: titles of the columns; None prints no header.
        rows: cells of each line; a row may have fewer than the others, and None draws a line of dashes.
        align: one character for each column, `<` left or `>` right; the last one serves the columns after it.
        indent: put before every line.

    Returns:
        The lines, without trailing blanks. Nothing is printed for a table without cells.
    """
    lines = [*([] if header is None else [header]), *rows]
    num_columns = max((len(line) for line in lines if line is not None), default=0)
    sides = align[:num_columns].ljust(num_columns, align[-1])
    widths = [
        max(len(line[column]) for line in lines if line is not None and column < len(line))
        for column in range(num_columns)
    ]
    dashes = "-" * (sum(widths) + len(_GAP) * max(0, num_columns - 1))
    text = (dashes if line is None else _GAP.join(map(_pad, line, widths, sides)) for line in lines)
    return [f"{indent}{line}".rstrip() for line in text]


def _pad(cell: str, width: int, side: str) -> str:
    return cell.ljust(width) if side == "<" else cell.rjust(width)
