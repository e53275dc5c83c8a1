"""Gradients whole on every rank, for comparisons: the distributed optimizer needs, and gets, its own shard only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def gather_gradients(wrapped: Sequence[Any]) -> None:
    """Make every rank's gradient buffers whole after they were reduced to shards. Collective.

    Args:
        wrapped: model chunks under data parallelism, made with `shard_gradients`.
    """
    for wrapper in wrapped:
        for group in [*wrapper.bucket_groups, *wrapper.expert_parallel_bucket_groups]:
            over = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shard = bucket.grad_data.chunk(over.size())[over.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=over)
