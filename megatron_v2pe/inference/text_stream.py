"""Tokens of an answer as text, piece by piece, until a stop text comes up."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_v2pe.data.text.answers import AnswerHeader
from megatron_v2pe.data.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # a character may span several tokens
_WINDOW = 64  # tokens decoded again with each new one; how tokens join depends on their neighbours alone


class TextStream:
    """Decodes a growing list of tokens.

    Args:
        tokenizer: the checkpoint's.
        stop: texts that end the answer; they are not part of it, nor is anything after them.
        header: what an answer begins with and is not part of its text; nothing is given out before it is over.

    Attributes:
        text: what was given out so far.
        is_stopped: a stop text came up.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), header: AnswerHeader | None = None
    ) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._header, self._start = header, None if header and header.ids else 0  # type: AnswerHeader | None, int | None
        self._held = max((len(text) - 1 for text in stop), default=0)
        self.text, self.is_stopped = "", False
        self._known, self._known_text = 0, ""  # tokens whose text is final, and that text

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that all tokens so far add to what was given out; "" while a character or stop text may be cut."""
        return self._advance(tokens, hold=True)

    def finish(self, tokens: Sequence[int]) -> str:
        """What is left when no more tokens come."""
        return self._advance(tokens, hold=False)

    def _advance(self, tokens: Sequence[int], *, hold: bool) -> str:
        if self.is_stopped:
            return ""
        if self._start is None and self._header is not None:
            self._start = self._header.end(tokens)
            if self._start is None and hold:
                return ""
        whole = self._decoded(tokens[self._start or 0 :])
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

    def _decoded(self, tokens: Sequence[int]) -> str:
        """Text of all tokens, of which only the last few are decoded."""
        while len(tokens) - self._known > 2 * _WINDOW:
            known = self._known + _WINDOW
            text = self._joined(tokens[:known])
            while text.endswith(_UNFINISHED) and known > self._known + 1:
                known -= 1
                text = self._joined(tokens[:known])
            self._known, self._known_text = known, text
        return self._joined(tokens)

    def _joined(self, tokens: Sequence[int]) -> str:
        """The final text, and what the tokens after it add to it."""
        start = max(0, self._known - _WINDOW)
        context = self._tokenizer.decode(tokens[start : self._known], skip_special_tokens=True)
        text = self._tokenizer.decode(tokens[start:], skip_special_tokens=True)
        return self._known_text + text[len(context) :]
