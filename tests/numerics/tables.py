"""Tables of docs/numerics.md, each between two marks: <!-- table: NAME --> and <!-- end of table -->."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
END = "<!-- end of table -->"


def mark(name):
    """Line before a table."""
    return f"<!-- table: {name}; written by python -m tests.numerics.measure {name} -->"


def figure(error):
    """A deviation with two digits: 5.6e-8."""
    return "0" if error == 0 else f"{error:.1e}".replace("e-0", "e-").replace("e+00", "")


def read(name, *, page=None):
    """Cells of each row of a table, by the row's first cell."""
    lines = _lines(name, (page or PAGE).read_text(encoding="utf-8"))
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {row[0]: row for row in rows}


def write(name, header, rows, *, order=None, page=None):
    """Replace a table.

    Args:
        name: of the marks.
        header: names of the columns.
        rows: lists of cells.
        order: first cells of all rows that the table has; rows of it that `rows` lacks stay as they are.
            Without it `rows` are the whole table.
        page: file; docs/numerics.md when None.

    Raises:
        ValueError: the page has no such table, or a row is of another length than the header.
    """
    page = page or PAGE
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"table {name}: {row} has {len(row)} cells, but the header has {len(header)}")
    if order is not None:
        known = {**read(name, page=page), **{row[0]: row for row in rows}}
        rows = [known[first] for first in order if first in known]
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    text = page.read_text(encoding="utf-8")
    old = "\n".join(_lines(name, text))
    page.write_text(
        text.replace(f"{mark(name)}\n{old}\n{END}", f"{mark(name)}\n{table}\n{END}"), encoding="utf-8"
    )


def _lines(name, text):
    found = re.search(re.escape(mark(name)) + r"\n(.*?)\n" + re.escape(END), text, flags=re.DOTALL)
    if found is None:
        raise ValueError(f"docs/numerics.md has no table {name!r}: no line {mark(name)}")
    return found.group(1).splitlines()
