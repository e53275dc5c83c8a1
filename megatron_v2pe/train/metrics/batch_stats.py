"""What a global batch holds, and how the ranks fared: one sum and one table over ranks for each step.

    PackedBatch --own numbers--> sum over data parallel ranks --> BatchStats.numbers, equal everywhere
    waits, memory, tiles, FLOPs of this rank --row of a table --> BatchStats.by_rank  (largest, smallest, which rank)

Ranks of a model replica hold the same packs; they differ in tiles, memory and waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import PackCounts, branch_flops, step_flops
from megatron_v2pe.parallel.topology import Ranks
from megatron_v2pe.train.reduce import gather_by_name, sum_by_name


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """Counts of a global batch, equal on every rank.

    Attributes:
        numbers: by their names in metrics.jsonl; docs/metrics.md says what each is.
        flops: model FLOPs of forward and backward, causal attention counted as half the pairs.
        flops_full_attention: the same with all pairs, as papers before FlashAttention count.
        by_rank: every rank's numbers by name, such as its waits.
    """

    numbers: dict[str, Any]
    flops: float
    flops_full_attention: float
    by_rank: dict[str, tuple[float, ...]]


def count_batches(
    batches: Sequence[PackedBatch], arch: InternVLArchitecture, *, ranks: Ranks, row: Mapping[str, float]
) -> BatchStats:
    """Count this rank's packs and reduce over ranks. Collective.

    Args:
        batches: this data parallel rank's packs of the step.
        arch: for FLOPs.
        ranks: this rank's place.
        row: how this rank fared, by name; the same names on every rank.
    """
    documents = [document for batch in batches for document in batch.layout.documents]
    strides = np.concatenate([document.strides for document in documents])
    packs = [_pack_counts(batch) for batch in batches]
    flops = step_flops(arch, packs)
    counts = {  # each is a number of the metrics as it is
        "tokens": sum(document.num_tokens for document in documents),
        "visual_tokens": sum(document.num_visual_tokens for document in documents),
        "supervised_tokens": sum(pack.supervised_tokens for pack in packs),
        "packs": len(batches),
        "samples": len(documents),
        "tiles": sum(batch.num_tiles for batch in batches),
    }
    others = {
        "padded_tokens": sum(batch.layout.num_tokens for batch in batches),
        "images": len(strides),
        "stride": int(strides.sum()),
        "flops": flops,
        "flops_full_attention": step_flops(arch, packs, full_attention=True),
        "digest": sum(_pack_digest(batch.sample_ids) for batch in batches),
    }
    group = ranks.groups.dp
    sums = {
        name: float(total)
        for name, total in sum_by_name({**counts, **others}, device=ranks.device, group=group).items()
    }
    by_rank = gather_by_name(
        {
            "max_position": max(document.next_position for document in documents) - 1,
            "stride_min": int(strides.min()) if len(strides) else float("inf"),
            "stride_max": int(strides.max()) if len(strides) else 0,
            "tiles": sum(end - start for start, end in (batch.tile_range for batch in batches)),
            "flops": flops,
            **row,
        },
        ranks=ranks,
    )
    return BatchStats(
        numbers={
            **{name: int(sums[name]) for name in counts},
            **_derived(sums, by_rank, dp=group.size()),
            **_branch_shares(arch, sums),
        },
        flops=sums["flops"],
        flops_full_attention=sums["flops_full_attention"],
        by_rank=by_rank,
    )


def _branch_shares(arch: InternVLArchitecture, sums: Mapping[str, float]) -> dict[str, Any]:
    """Share of each branch of a pyramid in the model FLOPs of the step; nothing without a pyramid."""
    shares = branch_flops(arch, int(sums["tiles"]))
    return (
        {"flops_share_by_branch": {name: flops / sums["flops"] for name, flops in shares.items()}}
        if shares
        else {}
    )


def _derived(sums: Mapping[str, float], by_rank: Mapping[str, Sequence[float]], *, dp: int) -> dict[str, Any]:
    """Numbers that follow from sums and from values of all ranks."""
    num_images = sums["images"]
    return {
        "padding_share": 1 - sums["tokens"] / sums["padded_tokens"],
        "max_position": int(max(by_rank["max_position"])),
        "stride_min": int(min(by_rank["stride_min"])) if num_images else 0,
        "stride_mean": sums["stride"] / num_images if num_images else 0.0,
        "stride_max": int(max(by_rank["stride_max"])),
        "max_tiles_per_rank": int(max(by_rank["tiles"])),
        "imbalance": max(by_rank["flops"]) * dp / sums["flops"],
        "data_digest": f"{int(sums['digest']):x}",
    }


def _pack_counts(batch: PackedBatch) -> PackCounts:
    lengths = batch.layout.cu_seqlens[1:] - batch.layout.cu_seqlens[:-1]
    return PackCounts(
        document_lengths=tuple(lengths.tolist()),
        supervised_tokens=int((batch.labels != IGNORE_INDEX).sum()),
        num_tiles=batch.num_tiles,
    )


def _pack_digest(sample_ids: Sequence[str]) -> int:
    """38 bits of the samples of a pack, in order; 2**15 of them add up exactly in float64."""
    digest = hashlib.blake2b("\n".join(sample_ids).encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little") >> 2
