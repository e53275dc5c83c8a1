"""Which tokens are supervised: each answer with its closing separator, and nothing else.

The rule used in training takes answer ranges from the rendering and carries them through the tokenizer, so it
cannot lose a sample. The release re-tokenises pieces of the text and adds up their lengths; where the sum
differs from the number of tokens that are not padding (a real `</s>` counts as padding, a dummy prefix adds
tokens), it drops all supervision of the sample (its defect D25). That rule is kept for comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.data.templates import ChatTemplate
from megatron_v2pe.data.tokenizer import Tokenizer
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
    """Supervised ranges as the release's `preprocess_internlm` computes them.

    Args:
        text: rendered conversation, images expanded to their visual tokens.
        tokens: int64 [t], ids of `text` cut to `max_tokens`.
        tokenizer: the checkpoint's.
        template: `internlm2-chat`.
        max_tokens: the release's `model_max_length`.

    Returns:
        half-open token ranges, and whether the lengths disagreed, in which case there are none.

    Raises:
        ValueError: the user's role appears inside a message, which the release cannot split.
    """

    def length(piece: str) -> int:
        return len(tokenizer.encode(piece, add_bos=False))

    first, *rounds = text.split(template.assistant_role)
    position = 1 + length(first + template.assistant_role)
    spans: list[Span] = []
    for index, piece in enumerate(rounds):
        is_last = index == len(rounds) - 1
        answer, question = (piece, "") if is_last else piece.split(template.user_role)
        spans.append((position, position + length(answer)))
        position = spans[-1][1]
        if not is_last:
            position += length(template.user_role + question + template.assistant_role)
    num_real = int((tokens != tokenizer.pad_id).sum())
    if position < max_tokens and position != num_real:
        return [], True
    inside = [(start, min(end, len(tokens))) for start, end in spans]
    return [(start, end) for start, end in inside if start < end], False
