"""A document of a wanted size with things at wanted depths.

    sentence sentence <image> sentence NEEDLE sentence <image> ... sentence filler

Sizes are sums of counted units. An image is hundreds of tokens, so one that would push a needle away from its depth
waits until the needle is in; a needle is thus never further from its depth than half a sentence, unless another
needle is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.synthesis.document.counter import TokenCounter
from megatron_v2pe.synthesis.document.filler import exact_text
from megatron_v2pe.synthesis.document.haystack import Sentence, TextStream
from megatron_v2pe.synthesis.material.pictures import Picture
from megatron_v2pe.synthesis.tasks.task import Insertion

NextPicture = Callable[[], Picture]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Text or images that stay together in a document.

    Attributes:
        text: what is written, lead and placeholders included.
        tokens: tokens, visual ones included.
        pictures: images of the placeholders.
        insertion: what it was inserted for; None for the haystack.
    """

    text: str
    tokens: int
    pictures: tuple[Picture, ...] = ()
    insertion: Insertion | None = None


class TooShort(ValueError):  # noqa: N818 - it names what is
    """A document has no room for what must be in it.

    Attributes:
        needed: tokens of that.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} tokens are needed")
        self.needed = needed


def size_of(units: Sequence[Unit]) -> int:
    """Tokens of all units."""
    return sum(unit.tokens for unit in units)


def picture_unit(
    pictures: Sequence[Picture], counter: TokenCounter, insertion: Insertion | None = None
) -> Unit:
    """Images that follow one another on a line of their own."""
    tokens = counter.text("\n") + sum(counter.picture(picture) for picture in pictures)
    text = "\n" + IMAGE_PLACEHOLDER * len(pictures)
    return Unit(text=text, tokens=tokens, pictures=tuple(pictures), insertion=insertion)


def inserted_unit(insertion: Insertion, counter: TokenCounter) -> Unit:
    """What an insertion looks like in the document."""
    if insertion.pictures:
        return picture_unit(insertion.pictures, counter, insertion)
    text = " " + insertion.text
    return Unit(text=text, tokens=counter.text(text), insertion=insertion)


class DocumentBuilder:
    """Fills one document.

    Args:
        insertions: what must be in it.
        size: tokens of the whole document.
        stream: text of the haystack.
        next_picture: gives an image of the haystack; None for a document without.
        text_per_image: tokens of text after which an image is due.
        counter: counts tokens.

    Raises:
        TooShort: the insertions do not fit into `size`.
    """

    def __init__(
        self,
        insertions: Sequence[Insertion],
        *,
        size: int,
        stream: TextStream,
        next_picture: NextPicture | None,
        text_per_image: int,
        counter: TokenCounter,
    ) -> None:
        self._stream = stream
        self._next_picture = next_picture
        self._text_per_image = text_per_image
        self._counter = counter
        self._size = size
        by_depth = sorted(insertions, key=lambda insertion: insertion.depth)
        self._pending = [inserted_unit(insertion, counter) for insertion in by_depth]
        self._room = size - size_of(self._pending)
        self._units: list[Unit] = []
        self._used = 0
        self._text_since_image = 0
        self._waiting: Unit | None = None
        if self._room < 0:
            raise TooShort(size - self._room)

    def build(self) -> list[Unit]:
        """All units; their sizes add up to the wanted one."""
        while True:
            self._place_due(self._stream.peek().tokens)
            if not (self._add_image() or self._add_sentence()):
                break
        for sentence in exact_text(self._room, stream=self._stream, counter=self._counter):
            self._add_text(sentence)
        self._units += self._pending
        return self._units

    def _goal(self) -> float:
        """Tokens before the next insertion when it is at its depth; infinite when all are placed."""
        return self._goal_of(self._pending[0]) if self._pending else float("inf")

    def _goal_of(self, unit: Unit) -> float:
        return _insertion(unit).depth * (self._size - unit.tokens)

    def _place_due(self, next_tokens: int) -> None:
        """Place insertions that are nearer to their depth now than after the next sentence."""
        while self._pending and self._used + next_tokens / 2 >= self._goal():
            if self._lets_needle_pass():
                continue
            unit = self._pending.pop(0)
            self._units.append(unit)
            self._used += unit.tokens
            self._text_since_image = 0 if unit.pictures else self._text_since_image

    def _lets_needle_pass(self) -> bool:
        """A decoy that would push the next needle away from its depth goes after it."""
        first = self._pending[0]
        needle = next((unit for unit in self._pending if not _insertion(unit).is_decoy), first)
        if needle is first or self._used + first.tokens <= self._goal_of(needle):
            return False
        self._pending.remove(needle)
        self._pending.insert(0, needle)
        return True

    def _add_image(self) -> bool:
        """Add an image if one is due, fits, and leaves the next insertion its place."""
        if self._next_picture is None or self._text_since_image < self._text_per_image:
            return False
        if self._waiting is None:
            self._waiting = picture_unit([self._next_picture()], self._counter)
        unit = self._waiting
        if unit.tokens > self._room or self._used + unit.tokens > self._goal():
            return False
        self._append(unit)
        self._waiting = None
        self._text_since_image = 0
        return True

    def _add_sentence(self) -> bool:
        if self._stream.peek().tokens > self._room:
            return False
        self._add_text(self._stream.take())
        return True

    def _add_text(self, sentence: Sentence) -> None:
        self._append(Unit(text=sentence.text, tokens=sentence.tokens))
        self._text_since_image += sentence.tokens

    def _append(self, unit: Unit) -> None:
        self._units.append(unit)
        self._room -= unit.tokens
        self._used += unit.tokens


def _insertion(unit: Unit) -> Insertion:
    assert unit.insertion is not None
    return unit.insertion


def resize(units: Sequence[Unit], change: int, *, stream: TextStream, counter: TokenCounter) -> list[Unit]:
    """The document with `change` tokens more or less, at the end of its haystack.

    Args:
        units: of the document.
        change: tokens to add, negative to remove.
        stream: text to add.
        counter: counts tokens.

    Raises:
        TooShort: there is not so much haystack to remove.
    """
    units = list(units)
    end = max((place for place, unit in enumerate(units, start=1) if unit.insertion is None), default=0)
    tail = units[end:]
    head = units[:end]
    while change < 0:
        place = next((place for place in reversed(range(len(head))) if head[place].insertion is None), None)
        if place is None:
            raise TooShort(size_of(units))
        change += head.pop(place).tokens
    added = exact_text(change, stream=stream, counter=counter)
    return head + [Unit(text=each.text, tokens=each.tokens) for each in added] + tail


def realised_depths(units: Sequence[Unit]) -> list[float]:
    """Depth of each needle, decoys not counted: tokens before it over the document's other tokens."""
    total, before = size_of(units), 0
    depths = []
    for unit in units:
        if unit.insertion is not None and not unit.insertion.is_decoy:
            depths.append(before / max(1, total - unit.tokens))
        before += unit.tokens
    return depths
