"""Text of exactly so many tokens: whole sentences, then the beginning of one, then single words."""

from __future__ import annotations

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.document.haystack import Sentence, TextStream

_WHOLE_SENTENCE_TRIES = 40
_WORD_TRIES = 4000


def exact_text(tokens: int, *, stream: TextStream, counter: TokenCounter) -> list[Sentence]:
    """Sentences and beginnings of sentences that together have `tokens` tokens.

    Raises:
        DataError: the corpus has no words small enough, which needs a very odd tokenizer or corpus.
    """
    found: list[Sentence] = []
    while tokens > 0 and stream.peek().tokens <= tokens:
        found.append(stream.take())
        tokens -= found[-1].tokens
    for _ in range(_WHOLE_SENTENCE_TRIES):
        if tokens == 0:
            return found
        beginning = _longest_beginning(stream.random_sentence(), tokens, counter)
        if beginning is not None and beginning.tokens == tokens:
            return [*found, beginning]
    for _ in range(_WORD_TRIES):
        if tokens == 0:
            return found
        beginning = _longest_beginning(stream.random_sentence(), tokens, counter)
        if beginning is not None:
            found.append(beginning)
            tokens -= beginning.tokens
    raise DataError(
        f"--texts: no words of {tokens} tokens found to make a sample's length exact; give more or plainer text"
    )


def _longest_beginning(sentence: str, tokens: int, counter: TokenCounter) -> Sentence | None:
    """The first words of a sentence, as many as `tokens` tokens allow; None if not even one does."""
    words = sentence.split(" ")
    low, high = 0, len(words)
    best: Sentence | None = None
    while low < high:  # counts rise with every word
        middle = (low + high + 1) // 2
        text = " " + " ".join(words[:middle])
        count = counter.text(text)
        if sentence and 0 < count <= tokens:
            low, best = middle, Sentence(text=text, tokens=count)
        else:
            high = middle - 1
    return best
