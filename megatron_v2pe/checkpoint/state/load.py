"""Loading sharded state: the shards that a model asks for, from files of any other layout."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.state.private_api import (
    CheckpointingException,
    expand_factories,
    is_written_here,
    shards_in,
)
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group, gather_from_ranks
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.errors import CheckpointError

_READ_ERRORS = (CheckpointingException, CheckpointException, pickle.UnpicklingError, EOFError, OSError)


def load_state(folder: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Read what a sharded state dict asks for. Collective.

    Raises:
        CheckpointError: keys or shapes differ from what is stored (checked before anything is read), or the
            files cannot be read.
    """
    with ensure_process_group():
        _check_request(folder, sharded_state_dict)
        try:
            return dist_checkpointing.load(sharded_state_dict, str(folder))
        except _READ_ERRORS as error:
            raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from error


def stored_bytes(sharded_state_dict: dict[str, Any]) -> int:
    """Bytes of the tensors of a sharded state dict on disk, over all ranks. Collective."""
    expanded, _ = expand_factories(sharded_state_dict)
    own_bytes = sum(
        torch.Size(shard.local_shape).numel() * shard.dtype.itemsize
        for shard in shards_in(expanded)
        if is_written_here(shard)
    )
    return sum(gather_from_ranks(own_bytes))


def _check_request(folder: Path, sharded_state_dict: dict[str, Any]) -> None:
    stored = StateReader(folder).tensors
    expanded, _ = expand_factories(sharded_state_dict)
    problems = []
    for shard in shards_in(expanded):
        found, wanted = stored.get(shard.key), tuple(shard.global_shape)
        if found is None:
            problems.append(f"{shard.key} is not stored")
        elif not _fits(found.shape, wanted, may_be_padded=shard.allow_shape_mismatch):
            problems.append(f"{shard.key} is stored as {found.shape}, wanted {wanted}")
    # Stages ask for different keys; all must stop, or the others wait forever.
    everywhere = sorted({problem for rank in gather_from_ranks(problems) for problem in rank})
    raise_problems(f"{folder}: checkpoint of another model", everywhere)


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], *, may_be_padded: bool) -> bool:
    """Equal shapes; where tensor parallelism pads (vocabulary, vision heads) one dimension may differ."""
    if not may_be_padded or len(found) != len(wanted):
        return found == wanted
    return sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1
