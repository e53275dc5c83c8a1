"""Rows of CSV files and their like, as objects: column name -> cell.

image,question,answer
a.png,What is it?,a cat      --rows_of_table-->   ("qa.csv:2", {"image": "a.png", "question": ..., "answer": ...})
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened

DELIMITERS = {"a table with tabs": "\t", "a CSV table": ",", "a table with semicolons": ";"}
"""What separates the cells, by the kind of file that `file_kinds.annotation_kind` names."""
_MOST_CELL_CHARS = 16 * 2**20


class TableRow(dict[str, str]):
    """A row of a table: column -> cell, empty cells included."""


def rows_of_table(file: BinaryIO, path: str, kind: str) -> Iterator[tuple[str, TableRow]]:
    """Place (`file:line`, of the row's last line) and cells of each row; rows without any are skipped.

    Args:
        file: the content, utf-8.
        path: for messages.
        kind: one of `DELIMITERS`.

    Raises:
        DataError: a column without a name or with another's, a row with too many or too few cells, broken quotes.
    """
    usual = csv.field_size_limit(_MOST_CELL_CHARS)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=DELIMITERS[kind], strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        _check_header(header, path)
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{where}: has {len(cells)} cells, but the header {len(header)}; a cell that holds "
                    f"{DELIMITERS[kind]!r} or a line break is written in double quotes"
                )
            yield where, TableRow(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not a sound table ({error})") from None
    finally:
        csv.field_size_limit(usual)


def _check_header(header: list[str], path: str) -> None:
    twice = next((name for name, count in Counter(header).items() if count > 1), None)
    if "" in header or twice is not None:
        problem = "has a column without a name" if "" in header else f"names {shortened(twice)} twice"
        raise DataError(f"{path}:1: the first line {problem}; it must name each column, each once")
