"""Files of one json object per line: annotations that we read, metrics that we append."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError


def read_jsonl(path: str | Path, *, skip_cut: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file with their line numbers, counted from 1; empty lines are skipped.

    Args:
        path: the file.
        skip_cut: skip a last line without its end: its writer died, or the disk was full.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8, not json, or not an object.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the error of open alone is translated
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not (skip_cut and not line.endswith(b"\n")):
                yield number, _parse(line, f"{path}:{number}")


def append_json(path: str | Path, obj: Mapping[str, Any]) -> None:
    """Append one object as one line, in a single write, so that a killed run leaves whole lines.

    Raises:
        ValueError: a number is not finite; json has no spelling for it.
        OSError: it cannot be written, or not whole; nothing of it is left in the file.
    """
    line = (json.dumps(obj, allow_nan=False) + "\n").encode("utf-8")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
        if written < len(line):  # the last room of a disk
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid json ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise DataError(f"{where}: not valid json (nested too deep)") from None
    except ValueError as error:  # whole numbers of thousands of digits
        raise DataError(f"{where}: not valid json ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a json object, found {type(value).__name__}")
    return value
