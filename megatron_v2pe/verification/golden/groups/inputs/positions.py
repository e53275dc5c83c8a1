"""Golden cases of positions and rotary tables: exact integers against exact rationals.

    segments ["t", n] ["i", tiles] --> SampleLayout --position_units--> int64 --/T--> float32 --> sha256

Expected values come from rational arithmetic, so cases in which the release itself is inexact or fails
(float32 beyond 65,536) are met too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from megatron_v2pe.v2pe.layout import Int64Array, SampleLayout, pack_layout
from megatron_v2pe.v2pe.positions import position_units, release_padded_positions, to_float
from megatron_v2pe.v2pe.rope import RopePrecision, RopeSpec, apply_rotary, rope_angles
from megatron_v2pe.verification.golden.rows import Row, compared, equal

_COS_TOLERANCE = 1e-6  # float32 rounding of an angle below 2 pi, 2.4e-7, twice, and of the cosine
_REFERENCE_TOLERANCE = 2e-6
_TABLES: tuple[tuple[RopePrecision, str, float], ...] = (
    ("exact", "64", _COS_TOLERANCE),
    ("reference", "", _REFERENCE_TOLERANCE),
)


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every case of positions/positions.json; there is nothing of a family in them."""
    del family
    for case in json.loads((folder / "positions" / "positions.json").read_text())["cases"]:
        name = f"positions/{case['name']}"
        layout = _layout(case)
        units = position_units(pack_layout([layout]))
        if case["flag"] == "padding":
            yield _padded(name, case, units)
        else:
            yield from _exact(name, case, layout, units)


def _layout(case: dict[str, Any]) -> SampleLayout:
    """Layout of a case; right padding counts as text, as it does for the release's routine."""
    tokens_per_tile = case["num_image_token"]
    length, starts, tiles = 0, [], []
    for repeat, segments in case["segments_rle"]:
        for kind, size in list(segments) * repeat:
            if kind == "i":  # <img>, the visual tokens, </img>
                starts.append(length + 1)
                tiles.append(size)
            length += size if kind == "t" else size * tokens_per_tile + 2
    strides = case["per_image_strides"] or [case["stride"] or tokens_per_tile] * len(tiles)
    return SampleLayout(
        num_tokens=length + case["right_pad"],
        image_starts=np.array(starts, dtype=np.int64),
        num_tiles=np.array(tiles, dtype=np.int64),
        strides=np.array(strides, dtype=np.int64),
        tokens_per_tile=tokens_per_tile,
    )


def _exact(name: str, case: dict[str, Any], layout: SampleLayout, units: Int64Array) -> Iterator[Row]:
    positions = to_float(units, layout.tokens_per_tile)
    digest = hashlib.sha256(positions.astype("<f4").tobytes()).hexdigest()
    wanted = case["exact_sha256_float32"]
    yield equal(name, "sha256_float32", is_equal=digest == wanted, detail=f"{digest[:12]} for {wanted[:12]}")
    next_position = int(case["exact_next_position"])
    yield compared(name, "next_position", error=abs(layout.next_position - next_position), tolerance=0.0)
    if case.get("exact_runs"):
        yield _runs(name, case["exact_runs"], units, layout.tokens_per_tile)
    samples = case["samples_index_exact_float"]
    if samples:
        errors = [abs(float(positions[index]) - value) for index, value in samples]
        yield compared(name, "samples", error=max(errors), tolerance=0.0)


def _runs(name: str, runs: list[list[Any]], units: Int64Array, tokens_per_tile: int) -> Row:
    """Integers against rationals: start and step of each run are whole in units of 1/T."""
    expected = []
    for start, step, count in runs:
        first, rise = (Fraction(text) * tokens_per_tile for text in (start, step))
        if first.denominator != 1 or rise.denominator != 1:
            return equal(name, "runs", is_equal=False, detail=f"{start} or {step} is no multiple of 1/T")
        expected.append(int(first) + int(rise) * np.arange(count, dtype=np.int64))
    wanted = np.concatenate(expected)
    if len(wanted) != len(units):
        return equal(name, "runs", is_equal=False, detail=f"{len(units)} tokens for {len(wanted)}")
    return compared(name, "runs", error=float(np.abs(wanted - units).max()) / tokens_per_tile, tolerance=0.0)


def _padded(name: str, case: dict[str, Any], units: Int64Array) -> Row:
    keep = np.ones(len(units), dtype=bool)
    keep[case["pad_inside_at"]] = False
    keep[len(units) - case["right_pad"] :] = False
    positions = release_padded_positions(units, keep=keep, tokens_per_tile=case["num_image_token"])
    wanted = np.array(case["positions"])
    if len(wanted) != len(units):
        return equal(name, "positions", is_equal=False, detail=f"{len(units)} tokens for {len(wanted)}")
    error = np.abs(to_float(positions, case["num_image_token"]) - wanted).max()
    return compared(name, "positions", error=float(error), tolerance=0.0)


def run_rope(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Every table of positions/rope_tables: exact angles, the release's rounding, rotated vectors."""
    del family
    tensors = load_file(folder / "positions" / "rope_tables.safetensors")
    for case in json.loads((folder / "positions" / "rope_tables.json").read_text())["cases"]:
        prefix = f"{case['name']}/"
        table = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        yield from _rope_case(f"rope/{case['name']}", case, table)


def _rope_case(name: str, case: dict[str, Any], table: dict[str, Tensor]) -> Iterator[Row]:
    tokens_per_tile = 256
    units = (table["positions"].double() * tokens_per_tile).round().long()
    for precision, suffix, tolerance in _TABLES:
        spec = RopeSpec(
            dim=case["dim"],
            base=case["theta"],
            tokens_per_tile=tokens_per_tile,
            precision=precision,
            fractional=True,
        )
        angles = rope_angles(units, spec, rope_length=int(table["positions"].max()) + 1)
        for function in ("cos", "sin"):
            values = getattr(angles.double(), function)()
            error = float((values - table[function + suffix].double()).abs().max())
            yield compared(name, f"{function} {precision}", error=error, tolerance=tolerance)
    rotated = apply_rotary(table["q"].unsqueeze(1), angles).squeeze(1)  # [N, d] -> [N, 1, d] -> [N, d]
    # Two products of an entry with a table value each, so the table's tolerance times twice the entry.
    scale = max(1.0, 2 * float(table["q"].abs().max()))
    error = float((rotated - table["q_rotated"]).abs().max())
    yield compared(name, "q_rotated reference", error=error, tolerance=_REFERENCE_TOLERANCE * scale)
