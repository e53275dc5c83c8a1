"""Every record is read back before it counts, by the loader's own functions, from its json.

    length    tokens as training will find them, images opened from where the record says they are
    images    one for each placeholder
    needle    each statement once; words that only needles may have, nowhere else; depth where it was wanted

A failure is a mistake of ours, never of the user, and ends the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.data.media.medium import IMAGE_PLACEHOLDER
from megatron_v2pe.data.media.tiling import TilingRule
from megatron_v2pe.data.samples.draw import record_tiles
from megatron_v2pe.data.samples.encode import encode_record
from megatron_v2pe.data.samples.measure import probe_sizes
from megatron_v2pe.data.samples.records import parse_line
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.synthesis.kinds import SampleSpec
from megatron_v2pe.synthesis.material.texts import MAX_UNIT_CHARS
from megatron_v2pe.v2pe.layout import SampleLayout

_STRIDES = (1, 16, 64)


class BadRecord(RuntimeError):  # noqa: N818 - it names what it is
    """A record that does not keep its promise."""


def entry_of(out: Path, tiling: TilingRule) -> DatasetEntry:
    """The data set that the records of a folder will be part of."""
    return DatasetEntry(
        name="synthetic",
        annotation=str(out / "records"),
        root=str(out),
        max_dynamic_patch=tiling.max_tiles,
        dynamic_image_size=tiling.dynamic,
    )


def read_back(record: Mapping[str, Any], *, entry: DatasetEntry, settings: SampleSettings) -> SampleLayout:
    """What the loader makes of a record.

    Args:
        record: see `records.internvl_record`; its images are stored.
        entry: see `entry_of`.
        settings: of the run that will read it.
    """
    parsed = parse_line(json.dumps(record).encode(), entry=entry, line_number=1)
    sizes = probe_sizes(parsed, settings=settings)
    media = record_tiles(parsed, sizes, entry=entry, settings=settings)
    strides = np.full(len(sizes), settings.text.tokens_per_tile, dtype=np.int64)
    return encode_record(parsed, media=media, settings=settings.text, strides=strides).layout


def last_positions(layout: SampleLayout) -> dict[str, int]:
    """Position of the last token for several strides, in whole positions."""
    full = layout.tokens_per_tile
    return {
        str(stride): layout.with_strides(np.full(layout.num_images, stride)).next_position - 1
        for stride in (*(stride for stride in _STRIDES if stride < full), full)
    }


def check_record(record: Mapping[str, Any], spec: SampleSpec) -> None:
    """Placeholders, needles and depth of a record.

    Raises:
        BadRecord: a check failed.
    """
    message = record["conversations"][0]["value"]
    context = message[: record["meta"]["context_chars"]]
    num_images = record["meta"]["num_images"]
    _require(context.count(IMAGE_PLACEHOLDER) == num_images, record, f"does not show its {num_images} images")
    _check_needles(record, context)
    _check_depth(record, spec)


def _check_needles(record: Mapping[str, Any], context: str) -> None:
    meta = record["meta"]
    rest = context
    for statement in (*meta["needles"], *meta["decoys"]):
        if statement != "image":
            found = context.count(statement)
            _require(found == 1, record, f"has {found} times {statement!r}")
            rest = rest.replace(statement, "")
    for word in meta["forbidden"]:
        again = re.search(rf"\b{re.escape(word)}\b", rest, re.IGNORECASE)
        _require(again is None, record, f"has {word!r} outside of its needles")


def _check_depth(record: Mapping[str, Any], spec: SampleSpec) -> None:
    """A single needle of a haystack is in its band, or no further from it than one sentence and line break."""
    placed = record["meta"]["placed_depth"]
    if not isinstance(placed, float) or spec.kind.startswith("longvqa"):
        return
    low, high = spec.depth_band / spec.num_depths, (spec.depth_band + 1) / spec.num_depths
    # Bytes bound tokens for every tokenizer, and a sentence has at most MAX_UNIT_CHARS characters.
    slack = 4 * MAX_UNIT_CHARS / record["meta"]["context_length"]
    _require(
        low - slack <= placed <= high + slack,
        record,
        f"has its needle at depth {placed}, wanted {low:.3f} to {high:.3f}",
    )


def _require(is_kept: bool, record: Mapping[str, Any], problem: str) -> None:
    if not is_kept:
        raise BadRecord(f"{record['id']} {problem}; please report this with the command line")
