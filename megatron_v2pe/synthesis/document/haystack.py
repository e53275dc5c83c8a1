"""Running text for documents: passages in an order of their own for each sample, sentence by sentence, counted.

    corpus --permutation--> passage --sentences--> Sentence(text with its lead, tokens)

A sentence is left out where it would spoil the sample: it holds a token of the chat template or `<image>`, or a word
that only the needle may have. When all passages were used they start again in another order; how much of a document
is repetition is counted, because a million tokens from a small folder are mostly that.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.text.tokenizer import Tokenizer
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.material.corpus import Corpus

_CACHED_PASSAGES = 4096
_NO_BLANK_AFTER = "\u3002\uff01\uff1f"


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A sentence with the blank or line break before it, and the tokens of both."""

    text: str
    tokens: int


class Haystack:
    """Counted sentences of a corpus; the newest passages are kept.

    Args:
        corpus: passages of one split.
        counter: counts tokens.
        tokenizer: its added tokens must not appear in text.
    """

    def __init__(self, corpus: Corpus, counter: TokenCounter, tokenizer: Tokenizer) -> None:
        self._corpus, self._counter = corpus, counter
        reserved = [*tokenizer.added_tokens, IMAGE_PLACEHOLDER]
        self._reserved = re.compile("|".join(map(re.escape, sorted(reserved))))
        self._kept: OrderedDict[int, list[Sentence]] = OrderedDict()

    @property
    def passages(self) -> np.ndarray:
        """Numbers of all passages, int64 [n]."""
        return self._corpus.passages

    def sentences(self, passage: int) -> list[Sentence]:
        """Sentences of a passage, in order; may be empty."""
        if passage in self._kept:
            self._kept.move_to_end(passage)
            return self._kept[passage]
        found: list[Sentence] = []
        for lines in self._corpus.paragraphs(passage):
            lead = "\n"
            for line in lines:
                if not self._reserved.search(line):
                    found.append(Sentence(text=lead + line, tokens=self._counter.text(lead + line)))
                    lead = "" if line[-1] in _NO_BLANK_AFTER else " "
        self._kept[passage] = found
        if len(self._kept) > _CACHED_PASSAGES:
            self._kept.popitem(last=False)
        return found

    def stream(self, random: np.random.Generator, *, forbidden: Sequence[str]) -> TextStream:
        """Text for one sample.

        Args:
            random: decides the order of passages.
            forbidden: words that no sentence may have, in any case of letters.
        """
        return TextStream(self, random, forbidden)


class TextStream:
    """Endless sentences for one sample.

    Attributes:
        used: passages in the order in which they were begun.
        repeated_tokens: tokens of sentences that came a second time.
        tokens: tokens of all sentences taken.
    """

    def __init__(self, haystack: Haystack, random: np.random.Generator, forbidden: Sequence[str]) -> None:
        self._haystack, self._random = haystack, random
        words = "|".join(rf"\b{re.escape(word)}\b" for word in forbidden)
        self._forbidden = re.compile(words, re.IGNORECASE) if words else None
        self._order: list[int] = []
        self._rounds = 0
        self._pending: list[Sentence] = []
        self.used: list[int] = []
        self.tokens = 0
        self.repeated_tokens = 0

    def peek(self) -> Sentence:
        """The next sentence, which stays where it is.

        Raises:
            DataError: every sentence of the corpus is left out.
        """
        empty_rounds = self._rounds
        while not self._pending:
            if not self._order:
                if self._rounds > empty_rounds + 1:
                    raise DataError(
                        f"--texts: no sentence of the {len(self._haystack.passages)} passages of this split can be "
                        "used; give a folder with more text"
                    )
                self._order = self._random.permutation(self._haystack.passages)[::-1].tolist()
                self._rounds += 1
            self.used.append(self._order.pop())
            sentences = self._haystack.sentences(self.used[-1])
            self._pending = [each for each in reversed(sentences) if self.is_allowed(each.text)]
        return self._pending[-1]

    def take(self) -> Sentence:
        """The next sentence."""
        sentence = self.peek()
        self._pending.pop()
        self.tokens += sentence.tokens
        self.repeated_tokens += sentence.tokens if self._rounds > 1 else 0
        return sentence

    def is_allowed(self, text: str) -> bool:
        """Whether a text has no forbidden word."""
        return self._forbidden is None or not self._forbidden.search(text)

    def random_sentence(self) -> str:
        """Any sentence of any passage, without its lead; empty if the passage has none that is allowed."""
        passage = int(self._random.choice(self._haystack.passages))
        allowed = [each.text for each in self._haystack.sentences(passage) if self.is_allowed(each.text)]
        return allowed[int(self._random.integers(len(allowed)))].strip() if allowed else ""
