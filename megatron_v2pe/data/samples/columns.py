"""Flat rows with a question and an answer (tables, parquet files) as records with a conversation.

{"file": "a.png", "question": "What is it?", "answer": "a cat", "source": "web"}
--> {"image": "a.png", "conversations": [{"from": "human", ...}, {"from": "gpt", ...}]}      source: not read
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.excerpt import shortened

MEANINGS: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "images", "image_path", "image_file", "img"),
        *("file", "file_name", "filename", "photo", "picture"),
    ),
    "video": ("video", "videos", "video_path", "video_file"),
    "question": ("question", "query", "prompt", "instruction"),
    "answer": ("answer", "response", "label", "output", "caption"),
    "system": ("system", "system_prompt"),
    "id": ("id", "question_id", "questionid", "sample_id"),
}
"""Meaning -> names of columns that are recognised as it, whatever their case."""
_NEEDED = ("question", "answer")
_MEDIA_NAME = re.compile(r"\S.*\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mp4|mkv|webm|mov|avi)", re.IGNORECASE)
_CONVERSATIONS = ("conversations", "conversation", "messages")


def parse_columns(text: str) -> dict[str, str]:
    """Meaning -> column of "image=file,question=q".

    Raises:
        ConfigError: not of that form, or a meaning that is none.
    """
    columns: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        meaning, sign, column = (each.strip() for each in part.partition("="))
        if not sign or not column or meaning not in MEANINGS or meaning in columns:
            raise ConfigError(
                f"--columns: {part!r} is not MEANING=COLUMN with one of {', '.join(MEANINGS)}, each once; for example "
                "image=file,question=q,answer=a"
            )
        columns[meaning] = column
    return columns


def is_flat(row: Mapping[str, Any]) -> bool:
    """Whether a record has no conversation of its own, so that its columns may be one."""
    is_other = isinstance(row.get("query"), str) and "response" in row
    is_other |= isinstance(row.get("instruction"), str) and "output" in row
    return not is_other and not any(row.get(key) for key in _CONVERSATIONS)


def has_question_and_answer(names: list[str]) -> bool:
    """Whether columns of both meanings are recognised."""
    return all(any(name.lower() in MEANINGS[meaning] for name in names) for meaning in _NEEDED)


def find_columns(names: list[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Meaning -> column, as given, else recognised by name.

    Args:
        names: of the columns that are there.
        given: of `parse_columns`.
        where: `file:line`, for messages.

    Raises:
        DataError: a given column is not there, or two columns have one meaning, or question or answer is missing.
    """
    found = dict(given)
    for meaning, column in given.items():
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"is {near[0]!r} meant?" if near else _listed(names)
            raise DataError(
                f"{where}: --columns names {column!r} as {meaning}, but there is no such column; {hint}"
            )
    for meaning, known in MEANINGS.items():
        if meaning in given:
            continue
        fitting = [name for name in names if name.lower() in known and name not in given.values()]
        if len(fitting) > 1:
            raise DataError(
                f"{where}: {fitting[0]!r} and {fitting[1]!r} may both be the {meaning}; choose one with "
                f"--columns {meaning}={fitting[0]}"
            )
        if fitting:
            found[meaning] = fitting[0]
    missing = [meaning for meaning in _NEEDED if meaning not in found]
    if missing:
        raise DataError(
            f"{where}: no column is recognised as the {missing[0]}; {_listed(names)}; name it with "
            f"--columns {missing[0]}=COLUMN"
        )
    return found


def check_others(others: Mapping[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Refuse a column that is left out although it names files, or is nearly written as one that is read.

    Raises:
        DataError: names the column, and the option that reads it or says that another is meant.
    """
    for name, cell in others.items():
        for meaning in ("image", "video", "system"):
            is_file = meaning == "image" and isinstance(cell, str) and _MEDIA_NAME.fullmatch(cell.strip())
            is_near = difflib.get_close_matches(name.lower(), MEANINGS[meaning], n=1, cutoff=0.8)
            if meaning not in columns and (is_file or is_near):
                raise DataError(
                    f"{where}: column {shortened(name, 40)} would not be read ({shortened(cell, 40)}); name it with "
                    f"--columns {meaning}={name}, or remove it"
                )


def from_row(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The record of a row.

    An image or video cell is a name, or a json list of names; where the question has no placeholders for several,
    they come first, one a line.

    Raises:
        DataError: question or answer is empty or no text.
    """
    texts = {}
    for meaning in _NEEDED:
        value = row.get(columns[meaning])
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            state = "empty" if value is None or value == "" else f"{shortened(value)}, which is no text"
            raise DataError(f"{where}: {meaning} (column {columns[meaning]!r}) is {state}")
        texts[meaning] = value
    kept = {
        meaning: _names(row[columns[meaning]]) if meaning in ("image", "video") else row[columns[meaning]]
        for meaning in ("id", "system", "image", "video")
        if meaning in columns and row.get(columns[meaning]) not in (None, "")
    }
    question = texts["question"]
    for meaning in ("video", "image"):
        files, placeholder = kept.get(meaning), f"<{meaning}>"
        if isinstance(files, list) and len(files) > 1 and placeholder not in question:
            question = f"{placeholder}\n" * len(files) + question
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": texts["answer"]}]
    return {**kept, "conversations": turns}


def _names(cell: Any) -> Any:
    """A cell with one name, or a json list of names."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _listed(names: list[str]) -> str:
    return f"columns are {', '.join(shortened(name, 40) for name in names[:12])}"
