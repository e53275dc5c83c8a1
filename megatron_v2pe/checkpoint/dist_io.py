"""Sharded state through megatron.core.dist_checkpointing; the only file here that talks to other ranks.

    state key = name of the parameter in the whole, un-sharded model          (SHARDED_STATE_METADATA)
    save   shards of all ranks -> mcore's checks -> torch's checkpoint writer, one tensor in memory at a time
    load   the shards that a model asks for, from files of any other layout

Everyone who saves or loads a model goes through `model_sharded_state_dict`, so everyone asks for the same keys.
Per-layer keys (not mcore's stacked ones) let a reader take one layer without touching the others.

mcore's own writer is built for asynchronous saves: it copies every view before writing, forks, and starts a manager
process. Its plan is kept here, but the data goes through torch's synchronous writer, which resolves a tensor
when its turn comes; `read_later` uses this to write tensors that are not in memory yet.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_v2pe.checkpoint.folder import state_path
from megatron_v2pe.checkpoint.hf_io import TensorInfo
from megatron_v2pe.core.errors import CheckpointError, V2PEError
from megatron_v2pe.models.lora import is_adapter
from megatron_v2pe.parallel.topology import Ranks

SHARDED_STATE_METADATA: dict[str, Any] = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How mcore names and splits state: one key per layer; optimizer state in the shape of its parameter."""

ReadLater = Mapping[tuple[str, tuple[int, ...]], Callable[[], Tensor]]
"""(state key, offset of the shard) -> reads that shard when it is about to be written."""

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
        CheckpointError: the folder is not a complete checkpoint, or one of another model.
    """
    states = model_sharded_state_dict(chunks, ranks, wanted=own_parameter)
    load_into_chunks(chunks, load_state(state_path(checkpoint_folder), states), wanted=own_parameter)


def save_state(
    folder: Path, sharded_state_dict: dict[str, Any], *, read_later: ReadLater | None = None
) -> None:
    """Write a sharded state dict into `folder`, which exists and is empty. Collective.

    Args:
        folder: a folder that all ranks see.
        sharded_state_dict: mcore's ShardedTensor, ShardedObject, factories; plain values are stored once.
        read_later: readers of shards whose `data` is a meta tensor.

    Raises:
        CheckpointError: a rank could not write (raised on all).
    """
    with process_group():
        try:
            dist_checkpointing.save(sharded_state_dict, str(folder), _SerialSave(read_later or {}))
        except (CheckpointException, OSError) as error:
            raise CheckpointError(f"{folder}: cannot be written ({type(error).__name__}: {error})") from error


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


class StateReader:
    """Whole tensors of a state folder, one at a time, in this process alone.

    Args:
        folder: a state folder.

    Attributes:
        tensors: state key -> dtype and shape as stored.

    Raises:
        CheckpointError: the folder's metadata is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = CachedMetadataFileSystemReader(str(folder))
        try:
            stored = self._reader.read_metadata().state_dict_metadata
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{folder}: no readable .metadata ({type(error).__name__}: {error})"
            ) from None
        self.tensors = {
            key: TensorInfo(value.properties.dtype, tuple(value.size))
            for key, value in stored.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def read(self, key: str) -> Tensor:
        """One tensor, put together from its shards."""
        info = self.tensors[key]
        state = {key: torch.empty(info.shape, dtype=info.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="torch.distributed is disabled"
                )  # it is meant to be
                dcp.load(state, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{self.folder}: {key} cannot be read ({type(error).__name__}: {error})"
            ) from error
        return state[key]


class _SerialSave(SaveShardedStrategy):
    """torch's writer under mcore's plan; see the module docstring."""

    can_handle_sharded_objects = True

    def __init__(self, read_later: ReadLater) -> None:
        super().__init__("torch_dist", 1)
        self._read_later = read_later

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's main replicas."""
        shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            mcore_to_pyt_state_dict(shards),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir),
            planner=_ReadLaterPlanner(self._read_later),
        )


class _ReadLaterPlanner(MCoreSavePlanner):
    """mcore's planner, with shards read at the moment they are written."""

    def __init__(self, read_later: ReadLater) -> None:
        # The decentralised plan belongs to mcore's own writer; torch's gathers the plans on rank 0.
        super().__init__(flatten_state_dict=False, can_run_decentralized_global_plan=False)
        self._read_later = read_later

    def resolve_data(self, write_item: Any) -> Any:
        """Data of one write item."""
        index = write_item.index
        read = self._read_later.get((index.fqn, tuple(index.offset or ())))
        return super().resolve_data(write_item) if read is None else read()


def stored_bytes(sharded_state_dict: dict[str, Any]) -> int:
    """Bytes that a sharded state dict takes on disk, over all ranks. Collective."""
    shards, _ = extract_sharded_base(_built(sharded_state_dict))
    mine = sum(
        torch.Size(shard.local_shape).numel() * shard.dtype.itemsize
        for shard in nested_values(shards)
        if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id)
    )
    return sum(gather_from_ranks(mine))


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
