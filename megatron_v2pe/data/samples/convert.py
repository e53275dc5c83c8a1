"""Annotation files of any form to one record a line, in the form that training reads.

    files --records_of--> objects --images inside them written to files--> checked as training will --> OUT.jsonl

A record is written as it is, whatever its format, because formats are understood when it is read; only what a line of
json cannot hold (images as bytes or base64) is written beside it.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import decimal
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.data.samples.columns import (
    check_others,
    find_columns,
    from_row,
    has_question_and_answer,
    is_flat,
)
from megatron_v2pe.data.samples.formats import SYSTEM_NOTE, note_text
from megatron_v2pe.data.samples.records import is_base64_image, parse_record
from megatron_v2pe.data.sources.containers import records_of
from megatron_v2pe.data.sources.file_kinds import HEAD_BYTES, kind_of
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.sources.tables import TableRow

_SUFFIXES = {"a JPEG image": ".jpg", "a PNG image": ".png", "a GIF image": ".gif", "a WebP image": ".webp"}
_MEDIA_KEYS = ("image", "images", "video", "videos")
_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_PART_KEYS = (*_MEDIA_KEYS, "image_url", "video_url", "url", "path")
_SHOWN = 20


@dataclass(kw_only=True)
class Conversion:
    """What became of the records.

    Attributes:
        written: good records.
        bad: messages of the others, with file and number.
        media: files written for images inside records.
        notes: how often each note of `formats` occurs, and where first.
        columns: meaning -> column of rows that have no conversation of their own.
    """

    written: int = 0
    bad: list[str] = field(default_factory=list)
    media: int = 0
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """A summary, bad records last."""
        lines = [f"{self.written:,} records, {len(self.bad):,} bad, {self.media:,} media files written"]
        if self.columns:
            pairs = ", ".join(f"{column!r} is the {meaning}" for meaning, column in self.columns.items())
            lines.append(f"columns: {pairs}")
        lines += [note_text(note, count, place) for note, (count, place) in sorted(self.notes.items())]
        lines += [f"bad: {message}" for message in self.bad[:_SHOWN]]
        if len(self.bad) > _SHOWN:
            causes = Counter(message.split(": ", 1)[-1][:60] for message in self.bad)
            lines.append(f"... and {len(self.bad) - _SHOWN} more; most often: {causes.most_common(1)[0][0]}")
        return "\n".join(lines) + "\n"


class Converter:
    """Records of files as lines.

    Args:
        entry: format and roots of the data set.
        media: folder for images inside records; None refuses such records.
        columns: meaning -> column of rows with a question and an answer, see `columns.MEANINGS`.
    """

    def __init__(
        self, entry: DatasetEntry, media: Path | None, columns: Mapping[str, str] | None = None
    ) -> None:
        self._entry = entry
        self._media = media
        self._columns = dict(columns or {})
        self.result = Conversion()

    def lines(self, paths: Sequence[str]) -> list[str]:
        """Good records of files as lines of json.

        Raises:
            DataError: a file cannot be read, or holds no record.
        """
        found = []
        for path in paths:
            for where, value in records_of(path):
                if isinstance(
                    value, TableRow
                ):  # all rows have these columns: one error, not one for each row
                    self._check_columns(value, where)
                line = self._line(value, where)
                if line is not None:
                    found.append(line)
        if not found and not self.result.bad:
            raise DataError(f"{', '.join(paths)}: no record in it")
        return found

    def _line(self, value: Any, where: str) -> str | None:
        try:
            if not isinstance(value, dict):
                raise DataError(f"{where}: must be a json object, found {type(value).__name__}")
            value, others = self._record(value, where)
            for key in _MEDIA_KEYS:
                if key in value:
                    value[key] = self._with_files(value[key], where)
            for key in _MESSAGE_KEYS:
                if isinstance(value.get(key), list):
                    value[key] = [self._message(each, where) for each in value[key]]
            text = _json_text(value, where)
            record = parse_record({**others, **value}, entry=self._entry, sample_id=where, where=where)
        except (DataError, UnicodeEncodeError) as error:
            message = str(error)
            self.result.bad.append(message if message.startswith(where) else f"{where}: {message}")
            return None
        for note in (
            f"{SYSTEM_NOTE}their own" if each.startswith(SYSTEM_NOTE) else each for each in record.notes
        ):
            count, first = self.result.notes.get(note, (0, where))
            self.result.notes[note] = (count + 1, first)
        self.result.written += 1
        return text

    def _check_columns(self, row: TableRow, where: str) -> None:
        if is_flat(row):
            find_columns(list(row), self._columns, where)

    def _record(self, value: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of a json object or row, and columns of a row that are no part of it."""
        names = [key for key, each in value.items() if each is not None]
        if not is_flat(value):
            if self._columns:
                raise DataError(f"{where}: has a conversation of its own; leave out --columns")
        elif self._columns or isinstance(value, TableRow) or has_question_and_answer(names):
            columns = find_columns(names, self._columns, where)
            self.result.columns.update(columns)
            others = {key: value[key] for key in names if key not in columns.values()}
            check_others(others, columns, where)
            return from_row(value, columns, where), others
        return {key: value[key] for key in names}, {}

    def _message(self, message: Any, where: str) -> Any:
        """A message of parts, with names of files where parts hold files."""
        if not isinstance(message, dict) or not isinstance(message.get("content"), list):
            return message
        return {**message, "content": [self._part(part, where) for part in message["content"]]}

    def _part(self, part: Any, where: str) -> Any:
        if not isinstance(part, dict):
            return part
        return {
            key: self._with_files(value, where) if key in _PART_KEYS else value for key, value in part.items()
        }

    def _with_files(self, value: Any, where: str) -> Any:
        """A value of a media key, with names of files where it holds files."""
        if isinstance(value, list):
            return [self._with_files(each, where) for each in value]
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            return {**value, "url": self._with_files(value["url"], where)}
        content = _content(value, where)
        if content is None:
            return value["path"] if isinstance(value, dict) and isinstance(value.get("path"), str) else value
        if self._media is None:
            raise DataError(
                f"{where}: holds an image itself ({len(content):,} bytes); --media FOLDER writes it to a file"
            )
        suffix = _SUFFIXES.get(kind_of(content[:HEAD_BYTES]), ".bin")
        name = hashlib.sha256(content).hexdigest()[:32] + suffix
        if not (self._media / name).exists():
            write_atomic(self._media / name, content)
            self.result.media += 1
        return name


def _json_text(record: Mapping[str, Any], where: str) -> str:
    """A line of json; times and exact numbers of parquet become texts and numbers.

    Raises:
        DataError: names the key whose value json cannot hold.
        UnicodeEncodeError: half a surrogate pair.
    """
    for key, value in record.items():
        try:
            json.dumps(value, default=_json_value)
        except TypeError as error:
            raise DataError(
                f"{where}: key {shortened(key, 40)} cannot be written as json ({error}); remove it, or call it "
                "'image' if it holds a picture"
            ) from None
    text = json.dumps(record, ensure_ascii=False, default=_json_value)
    text.encode()
    return text


def _json_value(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise TypeError(f"it holds {type(value).__name__}")


def _content(value: Any, where: str) -> bytes | None:
    """Bytes that a value holds; None for a name.

    These are `{"bytes": ...}` of Hugging Face's data sets, also as base64 in json, a data: address, and base64 alone.
    """
    inner = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(inner, bytes):
        return inner
    if not isinstance(inner, str):
        return None
    if inner[:5].lower() == "data:":
        content = _decoded(inner.partition(",")[2])
        if content is None:
            raise DataError(f"{where}: a data: address that is not base64")
        return content
    if isinstance(value, dict) or is_base64_image(inner):
        return _decoded("".join(inner.split()))
    return None


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
