"""Short visual questions from any jsonl file: the raw material of Long-VQA.

    {"image": "a.png", "conversations": [human, gpt, human, gpt, ...]}      each pair is a question
    {"image": "a.png", "question": "...", "answer": "..."}

Only records of one image are used; others are counted as skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.sources.storage import resolve_path
from megatron_v2pe.synthesis.material.pictures import PoolImage


@dataclass(frozen=True, kw_only=True)
class RawQuestion:
    """A question about an image file that was not opened yet."""

    image: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class VqaItem:
    """A question about a usable image."""

    image: PoolImage
    question: str
    answer: str


def read_questions(path: Path, root: Path) -> Iterator[RawQuestion]:
    """All questions of a file.

    Args:
        path: jsonl.
        root: folder of its images.

    Raises:
        DataError: `file:line`, for a line that has neither of the two forms.
    """
    for number, values in read_jsonl(path):
        where = f"{path}:{number}"
        image = values.get("image")
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        if image is None or isinstance(image, list):
            continue
        if not isinstance(image, str) or not image:
            raise DataError(f"{where}: image is {image!r}, but must be a path below {root}")
        file = resolve_path(str(root), image, where=where)
        for question, answer in _pairs(values, where):
            yield RawQuestion(image=file, question=question, answer=answer)


def _pairs(values: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    turns = values.get("conversations")
    if turns is None:
        yield _clean(values.get("question"), where), _clean(values.get("answer"), where)
        return
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: conversations must be a list of messages")
    for human, gpt in zip(turns[::2], turns[1::2], strict=False):
        if (human.get("from"), gpt.get("from")) != ("human", "gpt"):
            raise DataError(f"{where}: messages must alternate human, gpt, ...")
        yield _clean(human.get("value"), where), _clean(gpt.get("value"), where)


def _clean(text: Any, where: str) -> str:
    """A question or answer without its placeholder."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.replace(IMAGE_PLACEHOLDER, "").strip():
        raise DataError(
            f"{where}: needs a 'question' and an 'answer', or 'conversations' with texts; found {text!r}"
        )
    return text.replace(IMAGE_PLACEHOLDER, "").strip()
