"""The text of an answer, without what the model says before it.

GPT-OSS begins an answer with `<|channel|>final<|message|>`, which it says itself; its control tokens are left out by
decoding, and the name of the channel is not. Training writes the header (see `ChatTemplate.answer_header`).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.data.text.templates import ChatTemplate
from megatron_v2pe.data.text.tokenizer import Tokenizer


class AnswerHeader:
    """The header of a template's answers, as tokens.

    Args:
        tokenizer: the checkpoint's.
        template: the checkpoint's.

    Attributes:
        ids: of the header; none for a template without one.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        header = template.answer_header
        self.ids: list[int] = tokenizer.encode(header, add_bos=False) if header else []

    def end(self, tokens: Sequence[int]) -> int | None:
        """Place after the first header in an answer's tokens; None where there is none yet, 0 without headers."""
        if not self.ids:
            return 0
        size = len(self.ids)
        for start in range(len(tokens) - size + 1):
            if list(tokens[start : start + size]) == self.ids:
                return start + size
        return None

    def without(self, tokens: Sequence[int]) -> list[int]:
        """An answer's tokens after the header; all of them where the model said none."""
        return list(tokens[self.end(tokens) or 0 :])
