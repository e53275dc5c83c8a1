"""Annotation lines: valid ones of every format, with keys, values, texts and bytes changed at random.

A line is a sample, or a DataError that names `file:line` and is short. Nothing else, and in no time.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from functools import lru_cache

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.encode import TextSettings, encode_conversation
from megatron_v2pe.data.samples.records import parse_line, write_images
from megatron_v2pe.data.text.templates import get_template
from megatron_v2pe.data.text.tokenizer import load_tokenizer
from tests.support.fuzzing.images import named
from tests.support.mixture import HF_FOLDER, entry

Case = tuple[str, bytes]
MOST_SECONDS, MOST_MESSAGE = 5.0, 2000
_ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
_SEEDS = [
    {"image": "a.png", "conversations": _ASKED},
    {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}]},
    {"video": "v.mp4", "clip": [1, 2.5], "conversations": [{"from": "human", "value": "<video>"}, _ASKED[1]]},
    {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                                              {"from": "human", "value": "c"},
                                              {"from": "gpt", "value": "d", "loss": False}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "x"}]},
                  {"role": "assistant", "content": "y"}]},
    {"query": "<image>x", "response": "y", "history": [["a", "b"]], "images": ["a.png"]},
    {"instruction": "x", "input": "y", "output": "z"},
]  # fmt: skip
_KEYS = ["image", "images", "video", "clip", "conversations", "messages", "from", "value", "role", "content", "loss",
         "system", "history", "query", "response", "type", "text", "uid", "audio", "start", "", "\ud800",
         "weight"]  # fmt: skip
_TEXTS = ["<image>", "<video>", r"\<image>", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<img>", "<IMG_CONTEXT>",
          "[UNUSED_TOKEN_145]", "\ud83d", "\ufdd0", "\0", "a" * 3000, "../x", "/etc/passwd", "s3://u:p@b/c",
          "data:image/png;base64,AAAA", "\u202e", "e\u0301" * 50]  # fmt: skip
_VALUES = [None, True, False, 0, -1, 1e308, 10**30, [], {}, "", [[]], [None], {"bytes": "x"}, float("nan")]


def generate(seed: int, count: int) -> Iterator[Case]:
    """Some lines, the same for the same seed."""
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        value: object = copy.deepcopy(draw.choice(_SEEDS))
        for _ in range(draw.randint(0, 4)):
            value = _changed(value, draw)
        line = bytearray(json.dumps(value, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass"))
        for _ in range(draw.choice([0, 0, 0, 1, 3])):
            line[draw.randrange(len(line))] = draw.randrange(256)
        yield (
            f"record-{seed}-{number}",
            bytes(line[: draw.randint(0, len(line))] if draw.random() < 0.05 else line),
        )


def _changed(value: object, draw: random.Random) -> object:
    """A value with one place of it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.2:
            value[draw.choice(_KEYS)] = _another(draw)
        elif kind < 0.3:
            value[draw.choice(_KEYS)] = value.pop(key)
        elif kind < 0.35:
            del value[key]
        else:
            value[key] = _changed(value[key], draw)
        return value
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return [*value, value[place]]
        value[place] = _changed(value[place], draw)
        return value
    if isinstance(value, str) and draw.random() < 0.7:
        place = draw.randint(0, len(value))
        return value[:place] + draw.choice(_TEXTS) + value[place:]
    return _another(draw)


def _another(draw: random.Random) -> object:
    return copy.deepcopy(draw.choice([*_VALUES, *_TEXTS]))


@lru_cache(maxsize=1)
def _settings() -> TextSettings:
    return TextSettings(
        tokenizer=load_tokenizer(HF_FOLDER),
        template=get_template("internlm2-chat"),
        tokens_per_tile=4,
        max_tokens=10**6,
    )


def check(case: Case) -> str:
    """`ok` or the message of a DataError.

    Raises:
        AssertionError: a message that is long or names no line, a forged token or label, or more than 5 seconds.
    """
    started = time.monotonic()
    outcome = _outcome(case[1])
    assert time.monotonic() - started < MOST_SECONDS, f"{case[0]}: slow"
    assert len(outcome) < MOST_MESSAGE, f"{case[0]}: a message of {len(outcome)} characters"
    return outcome


def _outcome(line: bytes) -> str:
    settings = _settings()
    try:
        record = parse_line(line, entry=entry(root="images"), line_number=3)
        record = write_images(record, [[(64, 48)] * (medium.num_images or 2) for medium in record.media])
    except DataError as error:
        return named(error, "a.jsonl:3: ")
    num_images = sum(turn.value.count("<image>") for turn in record.turns)
    encoded = encode_conversation(record.messages, num_tiles=[1] * num_images, settings=settings)
    tokenizer = settings.tokenizer
    assert (encoded.tokens == tokenizer.image_token_id).sum() == 4 * num_images, "forged visual tokens"
    assert not (encoded.labels == tokenizer.image_token_id).any(), "visual tokens are labels"
    said = sum(bool(turn.value) for turn in record.messages) + (not record.system)
    stops = (encoded.tokens == tokenizer.token_id("<|im_end|>")).sum()
    assert stops <= said, f"{stops} ends of {said} messages"
    return "ok"
