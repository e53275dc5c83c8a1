"""Resuming from a training checkpoint, at any tp, pp, cp, dp.

Tensors and optimizer state are stored in the shape of the whole model and load under any layout. Random generators
belong to the layout: they are restored at the same one, and seeded by the step at another (with a warning).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.checkpoint.files.adapter_record import read_record
from megatron_v2pe.checkpoint.files.folder import read_info, state_path
from megatron_v2pe.checkpoint.layout_state import generator_shard, restore_generators, topology_of
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.load import load_state
from megatron_v2pe.checkpoint.state.model_state import (
    every_parameter,
    load_into_model_chunks,
    model_sharded_state_dict,
    sharded_state_metadata,
)
from megatron_v2pe.checkpoint.state.optimizer_groups import with_own_groups
from megatron_v2pe.parallel.topology import Ranks, seed_generators

logger = logging.getLogger(__name__)
_SEEDS_PER_STEP = 1_000_003  # beyond what stages and tensor parallel ranks add to a seed


def load_checkpoint(
    folder: str | Path, *, model_chunks: Sequence[Any], optimizer: Any, ranks: Ranks
) -> RunState:
    """Restore model, optimizer and generators from a training checkpoint. Collective.

    From a checkpoint of adapters, only what it stores; the base's weights must be in the model already.

    Args:
        folder: a step folder, of any parallel layout.
        model_chunks: as they were given to the optimizer.
        optimizer: mcore's optimizer, freshly built.
        ranks: this rank's place in the layout.

    Raises:
        CheckpointError: not a complete training checkpoint, or one of another model.
    """
    info = read_info(folder)
    run_state = RunState.from_json(info.run_state)
    record = read_record(folder)
    wanted = record.holds if record else every_parameter
    states = model_sharded_state_dict(model_chunks, ranks, wanted=wanted)
    metadata = sharded_state_metadata(ranks)
    states["optimizer"] = optimizer.sharded_state_dict(dict(states), is_loading=True, metadata=metadata)
    has_same_layout = info.topology == topology_of(ranks)
    if has_same_layout:
        states["generators"] = generator_shard(ranks)
    else:
        logger.warning(
            "%s was written by another parallel layout (%s): random generators are seeded anew for step %d",
            folder,
            info.topology,
            run_state.step,
        )
    loaded = load_state(state_path(folder), states)
    load_into_model_chunks(model_chunks, loaded, wanted=wanted)
    optimizer.load_state_dict(with_own_groups(loaded["optimizer"], optimizer))
    if has_same_layout:
        restore_generators(loaded["generators"])
    else:  # not as at step 0, or the random numbers of the first steps would repeat
        seed_generators(run_state.data_seed + _SEEDS_PER_STEP * run_state.step)
    return run_state
