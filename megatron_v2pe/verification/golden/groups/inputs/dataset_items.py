"""Golden data set items: one annotation record through everything that training does to it.

    record -> parse -> image sizes -> grids -> tokens, labels, positions -> tiles -> normalised pixels

The release gives a text sample a blank tile that the model then ignores; we open no tile, so such items have none
of ours, and the items on which the release fails over that blank tile are simply encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, normalize_tiles
from megatron_v2pe.config.schema import PositionConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.medium import MediaRules, MediumTiles, load_tile_range
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.media.tiling import TilingRule
from megatron_v2pe.data.samples.draw import record_tiles
from megatron_v2pe.data.samples.encode import EncodedSample, TextSettings, encode_record
from megatron_v2pe.data.samples.measure import probe_sizes
from megatron_v2pe.data.samples.records import Record, parse_record
from megatron_v2pe.data.samples.settings import SampleSettings
from megatron_v2pe.data.sources.meta import DatasetEntry
from megatron_v2pe.data.text.masking import LabelRule
from megatron_v2pe.data.text.templates import ChatTemplate
from megatron_v2pe.data.text.tokenizer import Tokenizer
from megatron_v2pe.v2pe.layout import Int64Array, pack_layout
from megatron_v2pe.v2pe.positions import position_units, to_float
from megatron_v2pe.verification.golden.groups.inputs.text import (
    GoldenTokenizers,
    Unsupported,
    is_of_family,
    label_spans,
)
from megatron_v2pe.verification.golden.rows import Row, compared, equal, unsupported

_MAX_PIXELS = 10**9
_MAX_TOKENS = 2**31
_OTHER_PILLOW = 0.02


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of text/dataset_items.json."""
    tokenizers = GoldenTokenizers(folder)
    cases = json.loads((folder / "text" / "dataset_items.json").read_text(encoding="utf-8"))["cases"]
    for number, case in enumerate(cases):
        if is_of_family(case, family):
            name = f"dataset_items/{number}_{case['ckpt']}_{case['version']}"
            text = tokenizers.text(case)
            if isinstance(text, Unsupported):
                yield unsupported(name, "tokens", reason=text.reason)
            else:
                yield from _rows(name, case, folder / "tiling", text)


def _rows(
    name: str, case: dict[str, Any], images: Path, text: tuple[Tokenizer, ChatTemplate]
) -> Iterator[Row]:
    if case["reference_error"] is not None:
        yield _failure_row(name, case, images, text)
        return
    ours = _sample(case, images, text, "release")
    wanted = np.repeat(*np.array(case["input_ids_rle"], dtype=np.int64).T)
    yield equal(name, "tokens", is_equal=bool(np.array_equal(ours.tokens, wanted)), detail="token ids differ")
    spans = label_spans(ours.labels)
    yield equal(
        name,
        "labels",
        is_equal=spans == case["label_spans"],
        detail=f"{spans}, expected {case['label_spans']}",
    )
    yield _position_row(name, ours, case)
    num_tiles, num_wanted = ours.layout.total_tiles, sum(case["image_flags"])
    yield equal(
        name, "num_tiles", is_equal=num_tiles == num_wanted, detail=f"{num_tiles}, expected {num_wanted}"
    )
    if num_tiles and num_tiles == num_wanted:
        yield _pixel_row(name, ours, case)


def _failure_row(name: str, case: dict[str, Any], images: Path, text: tuple[Tokenizer, ChatTemplate]) -> Row:
    """Where the release fails: over its blank tile we encode plain text, elsewhere we refuse with a DataError."""
    try:
        ours = _sample(case, images, text, "exact")
    except DataError as error:
        return equal(
            name,
            "refused",
            is_equal=bool(case["item"].get("image")),
            detail=f"a text record was refused: {error}",
        )
    positions = position_units(pack_layout([ours.layout]))
    is_plain = bool(np.array_equal(positions, np.arange(len(ours.tokens)) * ours.layout.tokens_per_tile))
    return equal(
        name,
        "text_without_blank_tile",
        is_equal=is_plain and not case["item"].get("image"),
        detail="positions are not 0, 1, 2, ...",
    )


def _position_row(name: str, ours: EncodedSample, case: dict[str, Any]) -> Row:
    positions = to_float(position_units(pack_layout([ours.layout])), ours.layout.tokens_per_tile)
    runs = [start + step * np.arange(count) for start, step, count in case["position_runs"]]
    wanted = np.concatenate(runs)
    if len(positions) != len(wanted):
        return equal(
            name, "positions", is_equal=False, detail=f"{len(positions)} positions, expected {len(wanted)}"
        )
    tolerance = 2 * float(np.spacing(np.float32(wanted.max())))  # recorded as float32
    return compared(name, "positions", error=float(np.abs(positions - wanted).max()), tolerance=tolerance)


def _pixel_row(name: str, ours: EncodedSample, case: dict[str, Any]) -> Row:
    """Bit for bit with the same Pillow; the mean otherwise."""
    tiles = load_tile_range(
        ours.media, image_size=case["image_size"], tile_range=(0, ours.layout.total_tiles)
    )
    pixels: NDArray[np.float32] = normalize_tiles(torch.from_numpy(tiles), NORMALIZATION["imagenet"]).numpy()
    if hashlib.sha256(pixels.tobytes()).hexdigest() == case["pixel_sha256_float32"]:
        return compared(name, "pixels", error=0.0, tolerance=0.0, detail="sha256")
    error = abs(float(pixels.mean(dtype=np.float64)) - case["pixel_mean"])
    return compared(
        name, "pixels", error=error, tolerance=_OTHER_PILLOW * 0.01, detail="sha256 differs; mean compared"
    )


def _sample(
    case: dict[str, Any], images: Path, text: tuple[Tokenizer, ChatTemplate], rule: LabelRule
) -> EncodedSample:
    """Encode the case's record as training does, with the recorded strides."""
    entry = DatasetEntry(
        name="golden",
        annotation="golden",
        root=str(images),
    )
    settings = _settings(case, text, rule)
    record = parse_record(case["item"], entry=entry, sample_id="golden", where="golden")
    media = record_tiles(record, probe_sizes(record, settings=settings), entry=entry, settings=settings)
    strides = _strides(case, record, settings.text.tokens_per_tile)
    return _encode(record, media=media, settings=settings.text, strides=strides)


def _encode(
    record: Record, *, media: Sequence[MediumTiles], settings: TextSettings, strides: Int64Array
) -> EncodedSample:
    """With the release's labels a sample may have none, which `encode_record` refuses; then only they are its."""
    try:
        return encode_record(record, media=media, settings=settings, strides=strides)
    except DataError:
        if settings.label_rule != "release":
            raise
    sample = encode_record(
        record, media=media, settings=replace(settings, label_rule="exact"), strides=strides
    )
    return replace(sample, labels=np.full_like(sample.labels, IGNORE_INDEX))


def _settings(case: dict[str, Any], text: tuple[Tokenizer, ChatTemplate], rule: LabelRule) -> SampleSettings:
    return SampleSettings(
        text=TextSettings(
            tokenizer=text[0],
            template=text[1],
            tokens_per_tile=case["num_image_token"],
            max_tokens=case.get("max_length") or _MAX_TOKENS,
            label_rule=rule,
            control_tokens="token",
        ),
        tiling=TilingRule(
            image_size=case["image_size"],
            dynamic=case["dynamic_image_size"],
            min_tiles=case["min_dynamic_patch"],
            max_tiles=case["max_dynamic_patch"],
            use_thumbnail=case["use_thumbnail"],
            divide_by_images=case["dynamic_max_patch"],
        ),
        pad2square=False,
        normalize_type="imagenet",
        media=MediaRules(max_pixels=_MAX_PIXELS),
        position=PositionConfig(),
        seed=0,
    )


def _strides(case: dict[str, Any], record: Record, tokens_per_tile: int) -> Int64Array:
    """Recorded strides; the release draws them from Python's global generator."""
    num_images = len(record.media)
    if case["version"] == "v2pe_rnd":
        return np.array(case["rnd_strides"][:num_images], dtype=np.int64)
    stride = case["stride"] if case["version"] == "v2pe_fix" else tokens_per_tile
    return np.full(num_images, stride, dtype=np.int64)
