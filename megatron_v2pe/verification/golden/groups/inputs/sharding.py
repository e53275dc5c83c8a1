"""Golden sharding: which tokens a rank holds, against index tables.

The release cuts the whole pack as one row (`zigzag_index`); attention kernels want each sample cut on its own
(`per_sample_zigzag_index`), and that is what we do. The first is checked as what it is, a pack of one
document, so that all three tables go through the code that training uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from megatron_v2pe.parallel.zigzag import contiguous_indices, shard_indices
from megatron_v2pe.v2pe.layout import Int64Array, pack_layout, text_layout
from megatron_v2pe.verification.golden.rows import Row


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """Rows of every case under `sharding/`; sharding is the same for every family."""
    for table in sorted((folder / "sharding").glob("*.json")):
        cases: list[dict[str, Any]] = json.loads(table.read_text(encoding="utf-8"))["cases"]
        with safe_open(table.with_suffix(".safetensors"), framework="np") as tensors:
            for case in cases:
                for quantity, ours in _our_tables(case).items():
                    wanted = tensors.get_tensor(f"{case['name']}/{quantity}").astype(np.int64)
                    yield _row(case["name"], quantity, ours, wanted)


def _our_tables(case: dict[str, Any]) -> dict[str, Int64Array]:
    ranks = range(int(case["world_size"]))
    size = len(ranks)
    documents = [text_layout(length, tokens_per_tile=1) for length in case["sample_lengths"]]
    cu_seqlens = pack_layout(documents, pad_to_multiple=2 * size).cu_seqlens
    whole = cu_seqlens[[0, -1]]
    total = int(whole[1])
    return {
        "padded_cu_seqlens": cu_seqlens,
        "per_sample_zigzag_index": np.stack(
            [shard_indices(cu_seqlens, cp=size, cp_rank=rank) for rank in ranks]
        ),
        "zigzag_index": np.stack([shard_indices(whole, cp=size, cp_rank=rank) for rank in ranks]),
        "contiguous_index": np.stack([contiguous_indices(total, cp=size, cp_rank=rank) for rank in ranks]),
    }


def _row(case: str, quantity: str, ours: Int64Array, wanted: Int64Array) -> Row:
    if ours.shape != wanted.shape:
        detail = f"shape {list(ours.shape)}, expected {list(wanted.shape)}"
        return Row(case, quantity, error=None, tolerance=0.0, status="fail", detail=detail)
    error = float(np.abs(ours - wanted).max(initial=0))
    return Row(case, quantity, error=error, tolerance=0.0, status="fail" if error else "pass")
