"""What a training checkpoint records of its parallel layout: its sizes, and each rank's random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_v2pe.parallel.topology import Ranks


def topology_of(ranks: Ranks) -> dict[str, int]:
    """World size and parallel sizes, for `CheckpointInfo.topology`."""
    groups = ranks.groups
    return {
        "world_size": ranks.world_size,
        "tp": groups.tp.size(),
        "pp": groups.pp.size(),
        "cp": groups.cp.size(),
        "dp": groups.dp.size(),
    }


def generator_shard(ranks: Ranks) -> ShardedObject:
    """States of this rank's random generators, as one shard of an object with a shard per rank."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mcore": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("generators", state, (ranks.world_size,), (ranks.rank,), replica_id=0)


def restore_generators(state: dict[str, Any]) -> None:
    """Set this process's random generators to a loaded `generator_shard`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["mcore"])
