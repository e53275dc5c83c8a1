"""Records of annotation files that are not one json object a line: arrays, gzip, parquet, tables, json over lines.

    a.json (array or one object), a.json.gz, a.jsonl, a.parquet, a.csv --records_of--> (place, object), one at a time

Used by `convert-data`, which writes one record a line; training reads that form only, because its records are found by
byte offset.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.sources.file_kinds import HEAD_BYTES, annotation_kind
from megatron_v2pe.data.sources.storage import open_binary
from megatron_v2pe.data.sources.tables import DELIMITERS, rows_of_table

_BLOCK_CHARS = 2**20
_MOST_RECORD_CHARS = 64 * 2**20
_MOST_PARQUET_BYTES = 2**31
_BLANKS = " \t\r\n"
_ROWS = 256  # of a parquet file at a time


def records_of(path: str) -> Iterator[tuple[str, Any]]:
    """Place (`file:number`) and value of each record of a file, whatever form it has.

    Raises:
        DataError: it cannot be read, or is of no form that is known.
        ConfigError: the package for its form is not installed.
    """
    try:
        with open_binary(path) as file, _unpacked(file) as content:
            kind = annotation_kind(content.peek(HEAD_BYTES)[:HEAD_BYTES])
            if kind == "a parquet file":
                whole = content if isinstance(content, gzip.GzipFile) else None
                yield from _parquet_rows(file if whole is None else _in_memory(whole, path), path)
            elif kind in DELIMITERS:
                yield from rows_of_table(content, path, kind)
            elif kind in ("", "one json array", "json over several lines"):
                yield from _json_values(content, path)
            else:
                raise DataError(
                    f"{path}: is {kind}; records are read from json, jsonl, gzip, parquet, CSV and TSV files"
                )
    except (OSError, EOFError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: {text}; the file cannot be read") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not utf-8 ({error.reason})") from None


@contextmanager
def _unpacked(file: Any) -> Iterator[Any]:
    """The content, unpacked where the first bytes say gzip."""
    plain: Any = io.BufferedReader(file)
    if plain.peek(2)[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=plain) as unpacked:
            yield unpacked
    else:
        yield plain


def _json_values(file: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
    """Values of an array, or values one after the other; memory for one at a time."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    decoder, buffer, place, number, is_array = json.JSONDecoder(), "", 0, 0, None
    wanted = 1
    while True:
        while len(buffer) - place < wanted and (block := text.read(_BLOCK_CHARS)):
            buffer, place = buffer[place:] + block, 0
        is_end = len(buffer) - place < wanted
        place = _skipped(buffer, place, _BLANKS + ("," if is_array else ""))
        if is_array is None and buffer[place : place + 1]:
            is_array = buffer[place] == "["
            place += is_array
            continue
        if place >= len(buffer) or (is_array and buffer[place] == "]"):
            if is_end or place < len(buffer):
                return
            wanted = 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, place)
        except (ValueError, RecursionError) as error:
            if not is_end and wanted < _MOST_RECORD_CHARS:  # the rest of the value is still in the file
                wanted = 2 * max(len(buffer) - place, _BLOCK_CHARS)
                continue
            said = str(error).split(":")[0]
            raise DataError(
                f"{path}: record {number + 1} is not valid json ({said}): {shortened(buffer[place : place + 60])}"
            ) from None
        place, number, wanted = end, number + 1, 1
        yield f"{path}:{number}", value


def _skipped(text: str, place: int, letters: str) -> int:
    while place < len(text) and text[place] in letters:
        place += 1
    return place


def _in_memory(file: gzip.GzipFile, path: str) -> BinaryIO:
    """A file that cannot be searched, up to a bound: a few bytes of gzip may be a terabyte."""
    content = file.read(_MOST_PARQUET_BYTES + 1)
    if len(content) > _MOST_PARQUET_BYTES:
        raise DataError(
            f"{path}: a parquet file of more than {_MOST_PARQUET_BYTES:,} bytes within gzip; unpack it first"
        )
    return io.BytesIO(content)


def _parquet_rows(file: BinaryIO, path: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"{path}: parquet files need the package pyarrow, which is not installed; run  "
            "pip install 'megatron_v2pe[parquet]'"
        ) from None
    number = 0
    try:
        file.seek(0)
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", value
    except (ValueError, pyarrow.ArrowException) as error:  # ValueError: times that Python's types cannot hold
        raise DataError(f"{path}: not a sound parquet file ({str(error)[:200]})") from None
