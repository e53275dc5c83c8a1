"""What a global batch holds: counted on each rank from its own packs, then one sum and one maximum over ranks.

    PackedBatch --own numbers--> sum over data parallel ranks, maximum over the world --> BatchCounts, equal everywhere

Ranks of a model replica hold the same packs; they differ in tiles and in how long they waited for data, of which the
largest counts: the slowest rank makes all others wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.models.flops import PackCounts, step_flops
from megatron_v2pe.parallel.topology import Ranks

_RANKS = 2**20  # room for a rank below a time in milliseconds, both exact in float64


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Counts of a global batch.

    Attributes:
        tokens: tokens of documents, without padding.
        visual_tokens: tokens that stand for image features.
        supervised_tokens: tokens with a label.
        padding_share: padding over all tokens of the packs.
        samples: documents.
        max_position: largest whole position of any document.
        stride_min: smallest stride of an image, in units of 1/tokens_per_tile; 0 without images.
        stride_mean: mean over images.
        stride_max: largest.
        max_tiles_per_rank: most tiles that one rank encodes.
        imbalance: model FLOPs of the heaviest data parallel rank over the mean; 1 is even.
        flops: model FLOPs of forward and backward, causal attention counted as half the pairs.
        flops_full_attention: the same with all pairs, as papers before FlashAttention count.
        data_digest: sum of digests of the packs' samples, hexadecimal.
        data_s_max: longest wait for data of any rank, seconds.
        data_s_max_rank: the rank that waited so long.
    """

    tokens: int
    visual_tokens: int
    supervised_tokens: int
    padding_share: float
    samples: int
    max_position: int
    stride_min: int
    stride_mean: float
    stride_max: int
    max_tiles_per_rank: int
    imbalance: float
    flops: float
    flops_full_attention: float
    data_digest: str
    data_s_max: float
    data_s_max_rank: int


def count_batches(
    batches: Sequence[PackedBatch], arch: InternVLArchitecture, *, ranks: Ranks, data_seconds: float
) -> BatchCounts:
    """Count this rank's packs and agree over ranks. Collective.

    Args:
        batches: this data parallel rank's packs of the step.
        arch: for FLOPs.
        ranks: this rank's place.
        data_seconds: how long this rank waited for them.
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
            len(documents),
            len(strides),
            int(strides.sum()),
            flops,
            step_flops(arch, packs, full_attention=True),
            sum(_pack_digest(batch.sample_ids) for batch in batches),
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    maxima = torch.tensor(
        [
            max(document.next_position for document in documents) - 1,
            -int(strides.min()) if len(strides) else -float("inf"),
            int(strides.max()) if len(strides) else 0,
            sum(end - start for start, end in (batch.tile_range for batch in batches)),
            flops,
            round(data_seconds * 1000) * _RANKS + ranks.rank,
        ],
        dtype=torch.float64,
        device=ranks.device,
    )
    dist.all_reduce(sums, group=ranks.groups.dp)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return _joined(sums.tolist(), maxima.tolist(), dp_size=ranks.groups.dp.size())


def _joined(sums: Sequence[float], maxima: Sequence[float], *, dp_size: int) -> BatchCounts:
    tokens, visual, supervised, padded, samples, images, stride_sum, flops, flops_full, digest = sums
    position, negative_stride, stride_max, tiles, heaviest, waited = maxima
    milliseconds, slowest = divmod(int(waited), _RANKS)
    return BatchCounts(
        tokens=int(tokens),
        visual_tokens=int(visual),
        supervised_tokens=int(supervised),
        padding_share=1 - tokens / padded,
        samples=int(samples),
        max_position=int(position),
        stride_min=int(-negative_stride) if images else 0,
        stride_mean=stride_sum / images if images else 0.0,
        stride_max=int(stride_max),
        max_tiles_per_rank=int(tiles),
        imbalance=heaviest * dp_size / flops,
        flops=flops,
        flops_full_attention=flops_full,
        data_digest=f"{int(digest):x}",
        data_s_max=milliseconds / 1000,
        data_s_max_rank=slowest,
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
