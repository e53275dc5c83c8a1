"""Tokens of an answer as text, piece by piece, until a stop text comes up."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.data.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # a character may span several tokens


class TextStream:
    """Decodes a growing list of tokens.

    Args:
        tokenizer: the checkpoint's.
        stop: texts that end the answer; they are not part of it, nor is anything after them.

    Attributes:
        text: what was given out so far.
        is_stopped: a stop text came up.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._held = max((len(text) - 1 for text in stop), default=0)
        self.text, self.is_stopped = "", False

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that all tokens so far add to what was given out; "" while a character or stop text may be cut."""
        return self._advance(tokens, hold=True)

    def finish(self, tokens: Sequence[int]) -> str:
        """What is left when no more tokens come."""
        return self._advance(tokens, hold=False)

    def _advance(self, tokens: Sequence[int], *, hold: bool) -> str:
        if self.is_stopped:
            return ""
        whole = self._tokenizer.decode(tokens, skip_special_tokens=True)
        places = [place for place in (whole.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.is_stopped, whole = True, whole[: min(places)]
        elif hold:
            if whole.endswith(_UNFINISHED):
                return ""
            whole = whole[: len(whole) - self._held]
        if not whole.startswith(self.text):
            return ""  # a later token changed the blanks before it; what is right comes with the next one
        piece = whole[len(self.text) :]
        self.text = whole
        return piece
