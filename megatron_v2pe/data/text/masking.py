"""Which tokens are supervised: each answer with its stop token, and nothing else.

The rule used in training takes answer ranges from the rendering and carries them through the tokenizer, so it
cannot lose a sample. The release tokenises parts of the text again and adds up their lengths; where the sum
differs from the number of tokens that are not padding (a real `</s>` counts as padding, a dummy prefix adds
tokens), it drops all supervision of the sample. That rule is kept for comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.data.text.templates import ChatTemplate
from megatron_v2pe.data.text.tokenizer import Tokenizer
from megatron_v2pe.v2pe.layout import Int64Array

LabelRule = Literal["exact", "release"]
Span = tuple[int, int]


def make_labels(tokens: Int64Array, spans: Sequence[Span]) -> Int64Array:
    """Labels that equal the tokens inside half-open `spans` and IGNORE_INDEX elsewhere; int64 [t], unshifted."""
    labels = np.full(len(tokens), IGNORE_INDEX, dtype=np.int64)
    for start, end in spans:
        labels[start:end] = tokens[start:end]
    return labels


def release_spans(
    text: str, tokens: Int64Array, *, tokenizer: Tokenizer, template: ChatTemplate, max_tokens: int
) -> tuple[list[Span], bool]:
    """Supervised ranges as the release's `preprocess_internlm`, `_mpt` or `_phi3` computes them.

    Args:
        text: rendered conversation, images expanded to their visual tokens.
        tokens: int64 [t], ids of `text` cut to `max_tokens`.
        tokenizer: the checkpoint's.
        template: decides which of the three.
        max_tokens: the release's `model_max_length`.

    Returns:
        half-open token ranges, and whether the lengths disagreed, in which case there are none.

    Raises:
        ValueError: the user's role appears inside a message, which the rule for internlm2-chat cannot split.
    """
    if template.release_rule == "internlm":
        spans, position = _internlm_spans(text, tokenizer, template)
    else:
        spans, position = _turn_spans(text, tokens, tokenizer, template)
    num_real = int((tokens != tokenizer.pad_id).sum())
    if position < max_tokens and position != num_real:
        return [], True
    inside = [(start, min(end, len(tokens))) for start, end in spans]
    return [(start, end) for start, end in inside if start < end], False


def _internlm_spans(text: str, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[list[Span], int]:
    """Lengths of the texts between assistant roles, none with its beginning-of-sequence token."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, add_bos=False))

    first, *rounds = text.split(template.assistant_role)
    position = 1 + length(first + template.assistant_role)
    spans: list[Span] = []
    for index, following in enumerate(rounds):
        is_last = index == len(rounds) - 1
        answer, question = (following, "") if is_last else following.split(template.user_role)
        spans.append((position, position + length(answer)))
        position = spans[-1][1]
        if not is_last:
            position += length(template.user_role + question + template.assistant_role)
    return spans, position


def _turn_spans(
    text: str, tokens: Int64Array, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[list[Span], int]:
    """Lengths of whole rounds, minus their questions; the phi3 rule subtracts what the tokenizer puts in front.

    That is one token (beginning of sequence) for the first round and two (also the word mark) for the others. The
    separator of each round counts as one token, whether it is there or not.
    """
    is_phi3 = template.release_rule == "phi3"
    position = 1 if is_phi3 else 0
    is_kept = np.ones(len(tokens), dtype=bool)
    is_kept[:position] = False
    if is_phi3:
        is_kept[tokens == tokenizer.token_id("<|endoftext|>")] = False
    messages = text.split(template.separator)
    rounds = [messages[:3], *(messages[start : start + 2] for start in range(3, len(messages), 2))]
    header = template.separator + template.assistant_role
    for index, round_messages in enumerate(rounds):
        turn = template.separator.join(round_messages)
        parts = turn.split(header)
        if len(parts) != 2:
            break
        in_front = (1 if index == 0 else 2) if is_phi3 else 0
        question = len(tokenizer.encode(parts[0] + header)) - in_front
        is_kept[position : position + question] = False
        position += len(tokenizer.encode(turn)) + 1 - in_front
    is_kept[position:] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_kept, [False]]).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True)), position
