"""Sharded state through megatron.core.dist_checkpointing; here and in `state_save` ranks talk to each other.

    state key = name of the parameter in the whole, un-sharded model          (SHARDED_STATE_METADATA)
    save   see `state_save`
    load   the shards that a model asks for, from files of any other layout

Everyone who saves or loads a model goes through `model_sharded_state_dict`, so everyone asks for the same keys.
Per-layer keys (not mcore's stacked ones) let a reader take one layer without touching the others.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch.distributed.checkpoint.api import CheckpointException

from megatron_v2pe.checkpoint.files.adapter_record import require_whole
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import CheckpointError, V2PEError
from megatron_v2pe.models.lora import is_adapter
from megatron_v2pe.parallel.topology import Ranks

SHARDED_STATE_METADATA: dict[str, Any] = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How mcore names and splits state: one key per layer; optimizer state in the shape of its parameter."""

Wanted = Callable[[str], bool]
"""Whether a parameter of this name is saved or loaded."""

T = TypeVar("T")


def sharded_state_metadata(ranks: Ranks) -> dict[str, Any]:
    """`SHARDED_STATE_METADATA` with the group over which the decoder's weights are copies."""
    return {**SHARDED_STATE_METADATA, "dp_cp_group": ranks.groups.dp_cp}


def every_parameter(name: str) -> bool:
    """Of a whole model."""
    return True


def own_parameter(name: str) -> bool:
    """Of the model itself, not of adapters that were added to it."""
    return not is_adapter(name)


def model_sharded_state_dict(
    chunks: Sequence[torch.nn.Module], ranks: Ranks, *, wanted: Wanted = every_parameter
) -> dict[str, Any]:
    """What this rank's model chunks save or ask for, keyed `model0`, `model1`, ...; parameters that are `wanted`.

    Transformer Engine's `_extra_state` is left out: it is empty without fp8, and an imported checkpoint has none.
    """
    metadata = sharded_state_metadata(ranks)
    states = {}
    for i, chunk in enumerate(chunks):
        shards = _unwrapped(chunk).sharded_state_dict(metadata=metadata)
        states[f"model{i}"] = {
            k: v for k, v in shards.items() if wanted(k) and not k.endswith("_extra_state")
        }
    return states


def load_into_chunks(
    chunks: Sequence[torch.nn.Module], states: Mapping[str, Any], *, wanted: Wanted = every_parameter
) -> None:
    """Give loaded `model_sharded_state_dict` tensors to the chunks; parameters that are not `wanted` stay.

    Raises:
        CheckpointError: a parameter got nothing, or a tensor has no parameter.
    """
    for i, chunk in enumerate(chunks):
        result = _unwrapped(chunk).load_state_dict(states[f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if wanted(key) and not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"model and checkpoint differ: missing {missing}, unexpected {result.unexpected_keys}"
            )


def _unwrapped(chunk: Any) -> Any:
    """The chunk under mcore's wrappers: DDP prefixes keys with `module.` and hides what a load left out."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def load_model_weights(
    checkpoint_folder: str | Path, chunks: Sequence[torch.nn.Module], *, ranks: Ranks
) -> None:
    """Load weights alone, into a model of any parallel layout. Collective. Adapters of the model stay as they are.

    Call it before the optimizer is built, whose float32 copies are taken from the weights at that time.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, holds adapters alone, or is of another model.
    """
    require_whole(checkpoint_folder)
    states = model_sharded_state_dict(chunks, ranks, wanted=own_parameter)
    load_into_chunks(chunks, load_state(state_path(checkpoint_folder), states), wanted=own_parameter)


def load_state(folder: Path, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Read what a sharded state dict asks for. Collective.

    Raises:
        CheckpointError: keys or shapes differ from what is stored (checked before anything is read), or the
            files cannot be read.
    """
    with process_group():
        _check_request(folder, sharded_state_dict)
        try:
            return dist_checkpointing.load(sharded_state_dict, str(folder))
        except (
            CheckpointingException,
            CheckpointException,
            pickle.UnpicklingError,
            EOFError,
            OSError,
        ) as error:
            raise CheckpointError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from error


def stored_bytes(sharded_state_dict: dict[str, Any]) -> int:
    """Bytes that a sharded state dict takes on disk, over all ranks. Collective."""
    shards, _ = extract_sharded_base(_built(sharded_state_dict))
    mine = sum(
        torch.Size(shard.local_shape).numel() * shard.dtype.itemsize
        for shard in nested_values(shards)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    )
    return sum(gather_from_ranks(mine))


def any_in_group(flags: Sequence[bool], group: Any) -> list[bool]:
    """For each flag, whether any rank of the group has it set. Collective over the group."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    joined = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(joined, op=dist.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in joined.tolist()]


def gather_from_ranks(value: T) -> list[T]:
    """The values of all ranks, in rank order. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_request(folder: Path, sharded_state_dict: dict[str, Any]) -> None:
    stored = StateReader(folder).tensors
    requested, _ = extract_sharded_base(_built(sharded_state_dict))
    problems = []
    for shard in nested_values(requested):
        if not isinstance(shard, ShardedTensor):
            continue
        found, wanted = stored.get(shard.key), tuple(shard.global_shape)
        if found is None:
            problems.append(f"{shard.key} is not stored")
        elif not _fits(found.shape, wanted, may_be_padded=shard.allow_shape_mismatch):
            problems.append(f"{shard.key} is stored as {found.shape}, wanted {wanted}")
    # Stages ask for different keys; all must stop, or the others wait for ever.
    everywhere = sorted({problem for rank in gather_from_ranks(problems) for problem in rank})
    raise_together(f"{folder}: checkpoint of another model", everywhere)


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], *, may_be_padded: bool) -> bool:
    """Equal shapes; where tensor parallelism pads (vocabulary, vision heads) one dimension may differ."""
    if not may_be_padded or len(found) != len(wanted):
        return found == wanted
    return sum(a != b for a, b in zip(found, wanted, strict=True)) <= 1


def _built(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy in which factories (gate and up) are replaced by the shards that they build."""
    copy, _, _ = load_preprocess(sharded_state_dict)
    return copy


def raise_together(what: str, problems: Sequence[str], *, shown: int = 20) -> None:
    """Raise one CheckpointError for a list of problems; nothing when it is empty."""
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise CheckpointError("\n  ".join([f"{what}:", *problems[:shown], *more]))


@contextmanager
def process_group() -> Iterator[None]:
    """A process group of this process alone where there is none, which mcore's checkpoints need."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return dist.get_rank(), dist.get_world_size()


def on_first_rank(act: Callable[[], T]) -> T:
    """Run `act` on rank 0 while the others wait; all get its result, or all raise its error. Collective."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = act()
        except Exception as error:  # told to every rank below, so that none of them waits for this one
            failure = error
    # Others get V2PE errors as they are, the rest as text: an exception of a library may not survive pickling.
    told = failure if failure is None or isinstance(failure, V2PEError) else RuntimeError(repr(failure))
    outcome: list[Any] = [result, told]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None or outcome[1] is not None:
        raise failure or outcome[1]
    return outcome[0]


def on_all_ranks(act: Callable[[], T]) -> T:
    """Run `act` on every rank; when it fails on some, all raise the first error. Collective.

    `act` itself must not wait for other ranks.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:  # told to every rank below, so that none of them waits for this one
        failure = error
    told = failure if failure is None or isinstance(failure, V2PEError) else RuntimeError(repr(failure))
    elsewhere = [error for error in gather_from_ranks(told) if error is not None]
    if failure is not None or elsewhere:
        raise failure or elsewhere[0]
    return result  # type: ignore[return-value]


@contextmanager
def launched_ranks() -> Iterator[None]:
    """The ranks that torchrun started, as a gloo process group; a process alone stays alone.

    Raises:
        ConfigError: the launcher's variables are incomplete.
    """
    if launcher().world_size == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
