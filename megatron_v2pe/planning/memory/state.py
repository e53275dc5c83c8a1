"""Weights, gradients and optimizer state of a rank, to the byte, as mcore lays them out.

    weights     one buffer of all trained parameters of a chunk, in the compute dtype; frozen parameters beside it
    gradients   one buffer of the same length, float32
    optimizer   this rank's 1 / (dp * cp) of the buffer: float32 copy (bf16 runs), first and second moment

mcore fills a buffer from the last parameter to the first, starts each at a multiple of 64 numbers, and ends each
bucket at a multiple of lcm(dp * cp, 128), so that ranks get equal shares. There is one bucket, but for a tied
embedding that two stages hold: it has one of its own. Gaps between parameters have gradients, and no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_v2pe.planning.memory.adapters import Parameter, is_adapter

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MAIN_WEIGHT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A run of the buffer that is reduced as one.

    Attributes:
        length: numbers, gaps included; a multiple of the ranks that share the optimizer.
        parameters: half-open runs of the bucket that parameters fill.
    """

    length: int
    parameters: tuple[tuple[int, int], ...]


def fill_buckets(
    sizes: Sequence[int], *, sharing_ranks: int, own_bucket: frozenset[int] = frozenset()
) -> list[Bucket]:
    """Lay out parameters as mcore's `_ParamAndGradBuffer` does.

    Args:
        sizes: numbers of each trained parameter, in order of the model.
        sharing_ranks: dp * cp.
        own_bucket: indices of parameters that get a bucket of their own (tied embeddings over stages).
    """
    buckets: list[Bucket] = []
    runs: list[tuple[int, int]] = []
    for index in reversed(range(len(sizes))):
        if index in own_bucket and runs:
            buckets.append(_close(runs, sharing_ranks))
            runs = []
        start = _round_up(runs[-1][1] if runs else 0, PARAMETER_ALIGNMENT)
        runs.append((start, start + sizes[index]))
        if index in own_bucket:
            buckets.append(_close(runs, sharing_ranks))
            runs = []
    return [*buckets, _close(runs, sharing_ranks)] if runs else buckets


def _close(runs: list[tuple[int, int]], sharing_ranks: int) -> Bucket:
    length = _round_up(runs[-1][1], math.lcm(sharing_ranks, BUCKET_ALIGNMENT))
    return Bucket(length=length, parameters=tuple(runs))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def shard_numbers(buckets: Sequence[Bucket], *, sharing_ranks: int, sharing_rank: int) -> int:
    """Numbers of parameters in a rank's share of each bucket; gaps do not count."""
    total = 0
    for bucket in buckets:
        share = bucket.length // sharing_ranks
        first, stop = sharing_rank * share, (sharing_rank + 1) * share
        total += sum(max(0, min(end, stop) - max(begin, first)) for begin, end in bucket.parameters)
    return total


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that stand on a rank for the whole run."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    def __add__(self, other: StateBytes) -> StateBytes:
        return StateBytes(
            weights_bytes=self.weights_bytes + other.weights_bytes,
            gradients_bytes=self.gradients_bytes + other.gradients_bytes,
            optimizer_bytes=self.optimizer_bytes + other.optimizer_bytes,
        )


def is_trained(parameter: str, frozen: frozenset[str]) -> bool:
    """Whether a parameter is trained, by its name and the parts that are not."""
    return parameter.partition(".")[0] not in frozen or is_adapter(parameter)


@lru_cache(maxsize=256)
def state_bytes(
    parameters: tuple[Parameter, ...],
    *,
    element_bytes: int,
    sharing_ranks: int,
    sharing_rank: int = 0,
    frozen: frozenset[str] = frozenset(),
    own_bucket: frozenset[str] = frozenset(),
) -> StateBytes:
    """State of one chunk on the rank `sharing_rank` of the dp * cp ranks that share its optimizer.

    Args:
        parameters: see `parameters.chunk_parameters`.
        element_bytes: 2 for bfloat16, 4 for float32.
        sharing_ranks: dp * cp.
        sharing_rank: which of them.
        frozen: parts (first words of names) whose own weights are not trained; adapters always are.
        own_bucket: names that get a bucket of their own.
    """
    still = [size for name, size in parameters if not is_trained(name, frozen)]
    trained = [(name, size) for name, size in parameters if is_trained(name, frozen)]
    alone = frozenset(index for index, (name, _) in enumerate(trained) if name in own_bucket)
    buckets = fill_buckets([size for _, size in trained], sharing_ranks=sharing_ranks, own_bucket=alone)
    length = sum(bucket.length for bucket in buckets)
    shard = shard_numbers(buckets, sharing_ranks=sharing_ranks, sharing_rank=sharing_rank)
    per_number = MOMENT_BYTES + (MAIN_WEIGHT_BYTES if element_bytes < MAIN_WEIGHT_BYTES else 0)
    return StateBytes(
        weights_bytes=(length + sum(still)) * element_bytes,
        gradients_bytes=length * GRADIENT_BYTES,
        optimizer_bytes=shard * per_number,
    )
