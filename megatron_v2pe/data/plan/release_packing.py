"""The release's own packer, for comparisons with it: greedy, one sample at a time, through a short buffer.

    sample -> first buffered pack with room -> merged (cut, if it overflows) -> full or oldest packs leave

Training uses `packing.best_fit_packs`, which fills packs better and loses nothing. This one drops samples with too
many tiles and discards text at a cut, as the release does. A text sample counts as one
tile, because the release gives it a blank one.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class GreedySample:
    """A sample as the greedy packer sees it.

    Attributes:
        sample_id: its identity.
        num_tokens: length.
        num_tiles: tiles; 1 for a text sample.
        image_spans: half-open token ranges of its images from `<img>` to `</img>`, needed only for cuts; a cut
            is possible only if each image is one tile.
    """

    sample_id: int
    num_tokens: int
    num_tiles: int
    image_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class PackedSlice:
    """Tokens start..end-1 of a sample; `document` numbers the samples merged into one buffer from 0."""

    sample: GreedySample
    start: int
    end: int
    document: int


@dataclass(kw_only=True)
class GreedyPack:
    """A pack that is being filled or has left."""

    members: list[PackedSlice] = field(default_factory=list)
    num_tiles: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all slices."""
        return sum(each.end - each.start for each in self.members)

    def image_spans(self) -> list[tuple[int, int]]:
        """Token ranges of all images, counted over the pack."""
        spans: list[tuple[int, int]] = []
        base = 0
        for each in self.members:
            inside = [span for span in each.sample.image_spans if each.start <= span[0] < each.end]
            spans += [(base + start - each.start, base + end - each.start) for start, end in inside]
            base += each.end - each.start
        return spans

    def cut(self, start: int, end: int) -> GreedyPack:
        """The tokens start..end-1 of this pack as a pack of their own."""
        members: list[PackedSlice] = []
        base = 0
        for each in self.members:
            low, high = max(start, base), min(end, base + each.end - each.start)
            if low < high:
                offset = each.start - base
                members.append(
                    PackedSlice(
                        sample=each.sample, start=low + offset, end=high + offset, document=each.document
                    )
                )
            base += each.end - each.start
        spans = self.image_spans()
        return GreedyPack(members=members, num_tiles=sum(start <= span[0] < end for span in spans))


class ReleaseGreedyPacker:
    """Packs samples in order of arrival.

    Args:
        max_tiles: the release's `num_images_expected`.
        max_tokens: its `max_packed_tokens`.
        max_buffer_size: packs that may wait.
        allow_overflow: merge beyond `max_tokens` once the buffer is half full, and cut.
        strict: emitted packs count `max_tiles` tiles, blank ones added.
    """

    def __init__(
        self,
        *,
        max_tiles: int,
        max_tokens: int,
        max_buffer_size: int,
        allow_overflow: bool = False,
        strict: bool = False,
    ) -> None:
        self._max_tiles = max_tiles
        self._max_tokens = max_tokens
        self._max_buffer_size = max_buffer_size
        self._allow_overflow = allow_overflow
        self._strict = strict
        self._buffer: list[GreedyPack] = []  # most tiles first

    def add(self, sample: GreedySample) -> list[GreedyPack]:
        """Add a sample and return the packs that leave.

        Raises:
            ValueError: the merged pack must be cut, but holds a text sample or an image of several tiles; the
                release fails there too.
        """
        pack = self._take_candidate(sample)
        document = pack.members[-1].document + 1 if pack.members else 0
        pack.members.append(PackedSlice(sample=sample, start=0, end=sample.num_tokens, document=document))
        pack.num_tiles += sample.num_tiles
        leaving: list[GreedyPack] = []
        for share in self._split(pack):
            if share.num_tokens == self._max_tokens and share.num_tiles <= self._max_tiles:
                leaving.append(share)
            elif share.num_tiles <= self._max_tiles:
                self._insert(share)
        while self._buffer and self._buffer[0].num_tiles == self._max_tiles:
            leaving.append(self._buffer.pop(0))
        while len(self._buffer) > self._max_buffer_size:
            leaving.append(self._buffer.pop(0))
        return [self._finished(each) for each in leaving]

    def flush(self) -> list[GreedyPack]:
        """The packs that still wait, most tiles first."""
        waiting, self._buffer = self._buffer, []
        return [self._finished(pack) for pack in waiting]

    def _take_candidate(self, sample: GreedySample) -> GreedyPack:
        """The buffered pack that the sample joins, taken out of the buffer, or a new one."""
        chosen: int | None = None
        for place, pack in enumerate(self._buffer):
            if pack.num_tiles + sample.num_tiles > self._max_tiles:
                continue
            if pack.num_tokens + sample.num_tokens <= self._max_tokens:
                chosen = place
                break
            if self._allow_overflow and len(self._buffer) >= self._max_buffer_size // 2:
                chosen = place
        return GreedyPack() if chosen is None else self._buffer.pop(chosen)

    def _insert(self, pack: GreedyPack) -> None:
        fewer = [place for place, other in enumerate(self._buffer) if other.num_tiles < pack.num_tiles]
        self._buffer.insert(fewer[0] if fewer else len(self._buffer), pack)

    def _split(self, pack: GreedyPack) -> list[GreedyPack]:
        """Packs of at most `max_tokens`; a cut through an image moves to its start, text up to the next is lost."""
        if pack.num_tokens <= self._max_tokens:
            return [pack]
        cut: list[GreedyPack] = []
        rest: GreedyPack | None = pack
        while rest is not None and rest.num_tokens > self._max_tokens:
            spans = rest.image_spans()
            if len(spans) != rest.num_tiles:
                raise ValueError(
                    f"a pack of {rest.num_tiles} tiles and {len(spans)} images cannot be cut; only packs of one-tile "
                    "images can"
                )
            hit = [start for start, end in spans if start <= self._max_tokens < end]
            left_end = hit[0] if hit else self._max_tokens
            later = [start for start, _ in spans if start >= left_end]
            left = rest.cut(0, left_end)
            cut += [left] if left.num_tiles else []
            rest = rest.cut(later[0], rest.num_tokens) if later else None
        return cut + ([rest] if rest is not None else [])

    def _finished(self, pack: GreedyPack) -> GreedyPack:
        if self._strict:
            pack.num_tiles = self._max_tiles
        return pack
