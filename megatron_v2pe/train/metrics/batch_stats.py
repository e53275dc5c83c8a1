"""What a global batch holds, and how the ranks fared: one sum and one table over ranks for each step.

    PackedBatch --own numbers--> sum over data parallel ranks --------------> BatchStats, equal everywhere
    waits, memory, tiles, FLOPs of this rank --a row for each rank-------->'  (largest, smallest, which rank)

Ranks of a model replica hold the same packs; they differ in tiles, memory and waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.models.flops import PackCounts, step_flops
from megatron_v2pe.parallel.topology import Ranks


@dataclass(frozen=True, kw_only=True)
class RankRow:
    """How one rank fared in a step.

    Attributes:
        data_s: how long it waited for its packs, seconds.
        comm_wait_s: how long it stood in communication, seconds (`parallel.comm_clock`); NaN where not measured.
        peak_mem_gib: most memory so far, GiB: allocated on the device, or resident on CPU.
        reserved_mem_gib: most that the device's allocator held so far, GiB; NaN on CPU.
    """

    data_s: float
    comm_wait_s: float
    peak_mem_gib: float
    reserved_mem_gib: float


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """Counts of a global batch.

    Attributes:
        tokens: tokens of documents, without padding.
        visual_tokens: tokens that stand for image features.
        supervised_tokens: tokens with a label.
        padding_share: padding over all tokens of the packs.
        packs: packs; the global batch size.
        samples: documents.
        max_position: largest whole position of any document.
        stride_min: smallest stride of an image, in units of 1/tokens_per_tile; 0 without images.
        stride_mean: mean over images.
        stride_max: largest.
        tiles: tiles of all packs; each is encoded once.
        max_tiles_per_rank: most tiles that one rank encodes.
        imbalance: model FLOPs of the heaviest data parallel rank over the mean; 1 is even.
        flops: model FLOPs of forward and backward, causal attention counted as half the pairs.
        flops_full_attention: the same with all pairs, as papers before FlashAttention count.
        data_digest: sum of digests of the packs' samples, hexadecimal.
        rows: how each rank fared, by rank.
    """

    tokens: int
    visual_tokens: int
    supervised_tokens: int
    padding_share: float
    packs: int
    samples: int
    max_position: int
    stride_min: int
    stride_mean: float
    stride_max: int
    tiles: int
    max_tiles_per_rank: int
    imbalance: float
    flops: float
    flops_full_attention: float
    data_digest: str
    rows: tuple[RankRow, ...]


def count_batches(
    batches: Sequence[PackedBatch], arch: InternVLArchitecture, *, ranks: Ranks, row: RankRow
) -> BatchStats:
    """Count this rank's packs and agree over ranks. Collective.

    Args:
        batches: this data parallel rank's packs of the step.
        arch: for FLOPs.
        ranks: this rank's place.
        row: how this rank fared.
    """
    documents = [document for batch in batches for document in batch.layout.documents]
    strides = np.concatenate([document.strides for document in documents])
    packs = [_pack_counts(batch) for batch in batches]
    flops = step_flops(arch, packs)
    sums = torch.tensor(
        [
            sum(document.num_tokens for document in documents),
            sum(document.num_visual_tokens for document in documents),
            sum(pack.supervised_tokens for pack in packs),
            sum(batch.layout.num_tokens for batch in batches),
            len(batches),
            len(documents),
            len(strides),
            int(strides.sum()),
            sum(batch.num_tiles for batch in batches),
            flops,
            step_flops(arch, packs, full_attention=True),
            sum(_pack_digest(batch.sample_ids) for batch in batches),
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    own = [
        max(document.next_position for document in documents) - 1,
        int(strides.min()) if len(strides) else float("inf"),
        int(strides.max()) if len(strides) else 0,
        sum(end - start for start, end in (batch.tile_range for batch in batches)),
        flops,
        *astuple(row),
    ]
    dist.all_reduce(sums, group=ranks.groups.dp)
    return _joined(sums.tolist(), _table(own, ranks), dp=ranks.groups.dp.size())


def _table(own: Sequence[float], ranks: Ranks) -> list[list[float]]:
    """Every rank's numbers, by rank: a sum of tables in which all other rows are zero."""
    table = torch.zeros(ranks.world_size, len(own), dtype=torch.float64)
    table[ranks.rank] = torch.tensor(own, dtype=torch.float64)
    table = table.to(ranks.device)
    dist.all_reduce(table)
    return table.tolist()


def _joined(sums: Sequence[float], table: Sequence[Sequence[float]], *, dp: int) -> BatchStats:
    (
        tokens,
        visual,
        supervised,
        padded,
        packs,
        samples,
        images,
        stride_sum,
        tiles,
        flops,
        flops_full,
        digest,
    ) = sums
    positions, smallest, largest, own_tiles, own_flops, *fared = zip(*table, strict=True)
    return BatchStats(
        tokens=int(tokens),
        visual_tokens=int(visual),
        supervised_tokens=int(supervised),
        padding_share=1 - tokens / padded,
        packs=int(packs),
        samples=int(samples),
        max_position=int(max(positions)),
        stride_min=int(min(smallest)) if images else 0,
        stride_mean=stride_sum / images if images else 0.0,
        stride_max=int(max(largest)),
        tiles=int(tiles),
        max_tiles_per_rank=int(max(own_tiles)),
        imbalance=max(own_flops) * dp / flops,
        flops=flops,
        flops_full_attention=flops_full,
        data_digest=f"{int(digest):x}",
        rows=tuple(
            RankRow(data_s=data, comm_wait_s=wait, peak_mem_gib=peak, reserved_mem_gib=reserved)
            for data, wait, peak, reserved in zip(*fared, strict=True)
        ),
    )


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
