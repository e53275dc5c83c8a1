"""Loading sharded state: the shards that a model asks for, from files of any other layout."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.checkpoint.state.private_api import (
    CheckpointingException,
    expand_factories,
    is_written_here,
    load_through,
    loaded_object,
    shards_in,
)
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group, gather_from_ranks
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.plain_files import read_json_object, read_plain

_READ_ERRORS = (CheckpointingException, CheckpointException, pickle.UnpicklingError, EOFError, OSError)
_COMMON_FILE, _FORMAT_FILE = "common.pt", "metadata.json"
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_MAX_COMMON_BYTES = 2**30


def load_state(folder: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Read what a sharded state dict asks for. Collective.

    Raises:
        CheckpointError: keys or shapes differ from what is stored (checked before anything is read), or the
            files cannot be read.
    """
    with ensure_process_group():
        stored = StateReader(folder)
        _check_small_files(folder)
        _check_request(stored, sharded_state_dict)
        try:
            return load_through(sharded_state_dict, folder, stored.metadata)
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


def _check_small_files(folder: Path) -> None:
    """Refuse what mcore would fail on, or run: plain values that are more than values, another format.

    Raises:
        CheckpointError: names the file.
    """
    try:
        found = read_json_object(folder / _FORMAT_FILE, max_bytes=2**16)
        common = read_plain(folder / _COMMON_FILE, max_bytes=_MAX_COMMON_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: no such file; the checkpoint is not whole") from None
    if {**_FORMAT, **found} != _FORMAT:
        raise CheckpointError(
            f"{folder / _FORMAT_FILE}: is not of format torch_dist, version 1: {str(found)[:200]}"
        )
    try:
        loaded_object(io.BytesIO(common))
    except Exception as error:  # of a damaged archive, torch fails in many ways
        reason = str(error).strip().partition("\n")[0][:300]
        raise CheckpointError(
            f"{folder / _COMMON_FILE}: damaged, or more than plain values ({type(error).__name__}: {reason})"
        ) from None


def _check_request(reader: StateReader, sharded_state_dict: dict[str, Any]) -> None:
    stored = reader.tensors
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
    raise_problems(f"{reader.folder}: checkpoint of another model", everywhere)


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], *, may_be_padded: bool) -> bool:
    """Equal shapes; where tensor parallelism pads (vocabulary, vision heads) one dimension may differ."""
    if not may_be_padded or len(found) != len(wanted):
        return found == wanted
    return sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1
