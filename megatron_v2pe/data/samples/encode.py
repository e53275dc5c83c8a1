"""From a checked record to tokens, labels and image spans; images are known by their size only.

    turns --images as <img></img>--> rendered text --tokenizer--> ids --visual tokens inserted--> tokens, labels

Visual tokens never exist as text: a sample of a thousand tiles has a quarter million of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER, MediumTiles, plain_text
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.data.samples.records import Record
from megatron_v2pe.data.text.masking import LabelRule, Span, make_labels, release_spans
from megatron_v2pe.data.text.templates import ChatTemplate, Turn, render
from megatron_v2pe.data.text.tokenizer import IMAGE_CONTEXT, IMAGE_END, IMAGE_START, Range, Tokenizer
from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout, blank_layout

ControlTokens = Literal["text", "refuse", "token"]
_IMAGE_PAIR = IMAGE_START + IMAGE_END


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedText:
    """A tokenised conversation.

    Attributes:
        tokens: int64 [t], visual tokens included, cut to the longest sample.
        labels: int64 [t], unshifted; IGNORE_INDEX where not supervised.
        image_starts: int64 [I], index of the first visual token of each image; may lie after the cut.
        num_uncut_tokens: length before the cut.
        lengths_disagree: the release's rule found its lengths in disagreement and dropped all labels.
    """

    tokens: Int64Array
    labels: Int64Array
    image_starts: Int64Array
    num_uncut_tokens: int
    lengths_disagree: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSample:
    """One document of a pack, without pixels.

    Attributes:
        tokens: int64 [t].
        labels: int64 [t], UNSHIFTED; IGNORE_INDEX where not supervised.
        layout: image spans and strides.
        media: how the images of each medium are cut, in order.
        sample_id: identity for messages.
        damage: why the sample is blank, if its record could not be read.
    """

    tokens: Int64Array
    labels: Int64Array
    layout: SampleLayout
    media: tuple[MediumTiles, ...]
    sample_id: str
    damage: str = ""


def blank_sample(
    sample_id: str, *, num_tokens: int, num_tiles: int, tokens_per_tile: int, damage: str
) -> EncodedSample:
    """Replaces a planned sample whose record cannot be read: its lengths, black tiles, nothing to learn."""
    grid = TileGrid(columns=num_tiles, rows=1, has_thumbnail=False)
    black = MediumTiles(medium=None, images=(ImageTiles(size=(1, 1), grid=grid),))
    return EncodedSample(
        tokens=np.zeros(num_tokens, dtype=np.int64),
        labels=np.full(num_tokens, IGNORE_INDEX, dtype=np.int64),
        layout=blank_layout(num_tokens, num_tiles=num_tiles, tokens_per_tile=tokens_per_tile),
        media=(black,) if num_tiles else (),
        sample_id=sample_id,
        damage=damage,
    )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What turns text into tokens.

    Attributes:
        tokenizer: the checkpoint's.
        template: see `templates.get_template`.
        tokens_per_tile: visual tokens of one tile.
        max_tokens: longest sample; what follows is cut.
        label_rule: `release` repeats the release's bookkeeping, for comparisons.
        control_tokens: what becomes of a control token that a record's text spells. `text`: it is text like any other;
            `refuse`: the record is bad; `token`: it becomes the token, as in the release, for comparisons.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    tokens_per_tile: int
    max_tokens: int
    label_rule: LabelRule = "exact"
    control_tokens: ControlTokens = "text"


def encode_conversation(
    turns: Sequence[Turn],
    *,
    num_tiles: Sequence[int],
    settings: TextSettings,
    add_generation_prompt: bool = False,
) -> EncodedText:
    """Tokenise a conversation.

    The first placeholders are those of the images in order; further placeholders stay as text, as in the release
    (`parse_record` refuses such records).

    Args:
        turns: messages, human and gpt in turn.
        num_tiles: tiles of each image, thumbnail included.
        settings: tokenizer, template and limits.
        add_generation_prompt: end with the assistant's role; the model answers next.

    Raises:
        ValueError: fewer placeholders than images.
    """
    text = _encode_text(
        turns, num_images=len(num_tiles), settings=settings, add_generation_prompt=add_generation_prompt
    )
    gaps = np.array(text.gaps, dtype=np.int64)
    lengths = np.asarray(num_tiles, dtype=np.int64) * settings.tokens_per_tile
    whole = np.insert(
        np.array(text.ids, dtype=np.int64), np.repeat(gaps, lengths), settings.tokenizer.image_token_id
    )
    tokens = whole[: settings.max_tokens]

    def shifted(place: int) -> int:
        """Index of a text token once the visual tokens before it are there."""
        return place + int(lengths[gaps < place].sum())

    spans: list[Span] = [(shifted(start), shifted(end)) for start, end in text.answers]
    lengths_disagree = False
    # Per message there is no bookkeeping of lengths to repeat: the answers' own ranges are the release's.
    has_bookkeeping = settings.template.release_rule != "per_message" and not text.is_plain
    if settings.label_rule == "release" and has_bookkeeping:
        spans, lengths_disagree = release_spans(
            _expanded(text.rendered, text.image_marks, lengths),
            tokens,
            tokenizer=settings.tokenizer,
            template=settings.template,
            max_tokens=settings.max_tokens,
        )
    return EncodedText(
        tokens=tokens,
        labels=_labels(tokens, spans, settings),
        image_starts=gaps + np.cumsum(lengths) - lengths,
        num_uncut_tokens=len(whole),
        lengths_disagree=lengths_disagree,
    )


def _labels(tokens: Int64Array, spans: Sequence[Span], settings: TextSettings) -> Int64Array:
    """Labels of the spans; visual tokens are never labels, but where the release's rule is repeated."""
    labels = make_labels(tokens, spans)
    if settings.label_rule == "exact":
        labels[labels == settings.tokenizer.image_token_id] = IGNORE_INDEX
    return labels


@dataclass(frozen=True, kw_only=True)
class _TextTokens:
    """The text of a conversation as ids, before visual tokens are put in.

    Attributes:
        ids: text tokens.
        gaps: for each image, how many text tokens precede its visual tokens.
        answers: half-open ranges of `ids` that are supervised.
        rendered: the text.
        image_marks: character offset of each image's inside in `rendered`.
        is_plain: a text without a template.
    """

    ids: list[int]
    gaps: list[int]
    answers: list[Span]
    rendered: str
    image_marks: list[int]
    is_plain: bool


def _encode_text(
    turns: Sequence[Turn], *, num_images: int, settings: TextSettings, add_generation_prompt: bool = False
) -> _TextTokens:
    turns, offsets = _mark_images(turns, num_images, settings.template)
    rendered = render(settings.template, turns, add_generation_prompt=add_generation_prompt)
    image_marks = [rendered.value_starts[turn] + offset for turn, offset in offsets]
    # Of a plain text everything is learned but images and their tags.
    answers = _without_pairs(rendered.answers, image_marks) if rendered.is_plain else rendered.answers
    marks = sorted([*image_marks, *(edge for answer in answers for edge in answer)])
    written = [] if settings.control_tokens == "token" else _without_pairs(rendered.written, image_marks)
    if settings.control_tokens == "refuse":
        _refuse_control_tokens(rendered.text, written, settings.tokenizer)
    ids, places = settings.tokenizer.encode_marked(rendered.text, marks, written=written)
    place_of = dict(zip(marks, places, strict=True))
    if rendered.is_plain:
        place_of[0] = 0  # with the beginning-of-sequence token
    return _TextTokens(
        ids=ids,
        gaps=[place_of[mark] for mark in image_marks],
        answers=[(place_of[start], place_of[end]) for start, end in answers],
        rendered=rendered.text,
        image_marks=image_marks,
        is_plain=rendered.is_plain,
    )


def _without_pairs(written: Sequence[Range], image_marks: Sequence[int]) -> list[Range]:
    """What a record wrote itself: its texts without the `<img></img>` that replaced placeholders."""
    ranges: list[Range] = []
    marks = iter([*image_marks, -1])
    mark = next(marks)
    for low, high in written:
        while low <= mark < high:
            ranges.append((low, mark - len(IMAGE_START)))
            low = mark + len(IMAGE_END)
            mark = next(marks)
        ranges.append((low, high))
    return [(low, high) for low, high in ranges if low < high]


def _refuse_control_tokens(text: str, written: Sequence[Range], tokenizer: Tokenizer) -> None:
    for low, high in written:
        token = tokenizer.control_token_in(text[low:high])
        if token:
            place = text.index(token, low)
            raise DataError(
                f"the text spells the control token {token} in {shortened(text[max(low, place - 20) : place + 40])}, "
                "and data.control_tokens is refuse; change the text, or set data.control_tokens to text"
            )


def conversation_length(
    turns: Sequence[Turn], *, num_tiles: Sequence[int], settings: TextSettings
) -> tuple[int, int]:
    """Length and supervised tokens of a whole conversation; `settings.max_tokens` does not cut it.

    The same numbers as `encode_conversation` gives, without making a quarter million visual tokens for them.

    Returns:
        tokens and supervised tokens.

    Raises:
        ValueError: fewer placeholders than images.
    """
    text = _encode_text(turns, num_images=len(num_tiles), settings=settings)
    supervised = sum(end - start for start, end in text.answers)
    return len(text.ids) + sum(num_tiles) * settings.tokens_per_tile, supervised


def _mark_images(
    turns: Sequence[Turn], num_images: int, template: ChatTemplate
) -> tuple[list[Turn], list[tuple[int, int]]]:
    """Turns with `<img></img>` for the first `num_images` placeholders, and where their insides are.

    Returns:
        turns, and (turn, character offset in its value) between `<img>` and `</img>` of each image.
    """
    marked: list[Turn] = []
    offsets: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        is_stripped = template.strip_values and turn.role != "pretrain"
        value = turn.value.strip() if is_stripped else turn.value
        text, *rest = value.split(IMAGE_PLACEHOLDER)
        for following in rest:
            if len(offsets) < num_images:
                offsets.append((index, len(plain_text(text)) + len(IMAGE_START)))
                text += _IMAGE_PAIR + following
            else:
                text += IMAGE_PLACEHOLDER + following
        marked.append(replace(turn, value=plain_text(text)))
    if len(offsets) < num_images:
        raise ValueError(f"{len(offsets)} times {IMAGE_PLACEHOLDER} for {num_images} images")
    return marked, offsets


def _expanded(text: str, image_marks: Sequence[int], lengths: Int64Array) -> str:
    """The text with its visual tokens spelled out, which only the release's label rule needs."""
    runs, last = [], 0
    for mark, length in zip(image_marks, lengths.tolist(), strict=True):
        runs += [text[last:mark], IMAGE_CONTEXT * length]
        last = mark
    return "".join([*runs, text[last:]])


def encode_record(
    record: Record,
    *,
    media: Sequence[MediumTiles],
    settings: TextSettings,
    strides: Int64Array,
) -> EncodedSample:
    """Encode a record whose images have been probed.

    Args:
        record: see `records.write_images`.
        media: its media with the grids of their images, in order.
        settings: tokenizer, template and limits.
        strides: int64 [I], position units that a visual token of each image advances.

    Raises:
        DataError: the cut at `settings.max_tokens` goes through an image, or leaves nothing supervised.
    """
    grids = [image.grid for each in media for image in each.images]
    num_tiles = np.array([grid.num_tiles for grid in grids], dtype=np.int64)
    encoded = encode_conversation(record.messages, num_tiles=num_tiles.tolist(), settings=settings)
    ends = encoded.image_starts + num_tiles * settings.tokens_per_tile
    was_cut = encoded.num_uncut_tokens > settings.max_tokens
    # `</img>` follows the visual tokens; without it the image is incomplete.
    if len(ends) and int(ends[-1]) + 1 > len(encoded.tokens):
        raise DataError(
            f"{record.where}: {encoded.num_uncut_tokens} tokens exceed data.max_sample_tokens = "
            f"{settings.max_tokens}, and the cut goes through image {int((ends >= len(encoded.tokens)).argmax()) + 1} "
            f"of {len(ends)}; raise the limit, lower data.max_dynamic_patch, or shorten the sample"
        )
    if bool((encoded.labels < 0).all()):
        cause = (
            f"is left after the cut at data.max_sample_tokens = {settings.max_tokens}"
            if was_cut
            else "exists"
        )
        raise DataError(f"{record.where}: no supervised token {cause}; the sample cannot train anything")
    layout = SampleLayout(
        num_tokens=len(encoded.tokens),
        image_starts=encoded.image_starts,
        num_tiles=num_tiles,
        strides=strides,
        tokens_per_tile=settings.tokens_per_tile,
    )
    return EncodedSample(
        tokens=encoded.tokens,
        labels=encoded.labels,
        layout=layout,
        media=tuple(media),
        sample_id=record.sample_id,
    )
