"""Reading published annotation files: every mistake names file, line or record, and key."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.jsonl import read_jsonl

Kinds = type | tuple[type, ...]


def need(record: Mapping[str, Any], key: str, kinds: Kinds, where: str) -> Any:
    """A value of a record.

    Args:
        record: as read.
        key: dots go down into objects, as `meta.choices`.
        kinds: types it may have.
        where: file and line, for the message.

    Raises:
        DataError: the key is missing, or its value has another type.
    """
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise DataError(f"{where}: key {key!r} is missing; the published files have it in every record")
        value = value[name]
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    is_odd_bool = isinstance(value, bool) and bool not in wanted
    if is_odd_bool or not isinstance(value, wanted):
        names = " or ".join(kind.__name__ for kind in wanted)
        raise DataError(f"{where}: {key} is {_short(value)}, but must be {names}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of a file of one json object per line.

    Raises:
        DataError: the file or a line cannot be read.
    """
    for number, record in read_jsonl(path):
        yield f"{path}:{number}", record


def json_file(path: Path) -> Any:
    """Content of a json file.

    Raises:
        DataError: it cannot be read, or is not json.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid json ({error})") from None


def json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file: record n, record) of a json file with a list of objects.

    Raises:
        DataError: see `json_file`; or it is not such a list.
    """
    content = json_file(path)
    if not isinstance(content, list):
        raise DataError(f"{path}: must be a list of records, found {type(content).__name__}")
    for number, record in enumerate(content):
        where = f"{path}: record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where}: must be an object, found {type(record).__name__}")
        yield where, record


def tsv_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:row, record) of a tab separated file with a head, as VLMEvalKit publishes them.

    Raises:
        DataError: it cannot be read, or has no head.
    """
    csv.field_size_limit(sys.maxsize)  # images are in the cells, as base64
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for number, record in enumerate(csv.DictReader(file, delimiter="\t"), start=2):
                yield f"{path}:{number}", record
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a tab separated file ({error})") from None


def inside(root: Path, name: str, where: str) -> str:
    """Path of a media file, which stays in the data folder.

    Raises:
        DataError: it leads out of it.
    """
    root = root.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise DataError(f"{where}: the path {name!r} leads out of {root}")
    return str(path)


def first_existing(*paths: Path) -> Path:
    """The first of several published names that is there, else the first."""
    return next((path for path in paths if path.exists()), paths[0])


def parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file: row n, record) of a parquet file, as Hugging Face publishes data sets.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: it cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{path}: reading parquet needs pyarrow, which is not installed; run  pip install 'megatron_v2pe[parquet]'"
        ) from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=16):
            for record in batch.to_pylist():
                yield f"{path}: row {number}", record
                number += 1
    except (
        OSError,
        ValueError,
        pyarrow.ArrowException,
    ) as error:  # ValueError: a value that Python has no type for
        raise DataError(f"{path}: cannot be read as parquet ({error})") from None
