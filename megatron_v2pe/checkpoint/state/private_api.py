"""All that this package uses of torch and megatron-core beyond their public API, so that a release changes one file.

    state dicts   `expand_factories`, `merge_factories`, `shards_in`, `built_shards`, `map_shards`, `is_written_here`
    saving        `save_through_plan`, `torch_state`, `save_planner`, `StorageInfo`
    loading       `load_through`, `loaded_object`
    errors        `all_ranks`, `failures_of`, `CheckpointingException`
    torch.save    `offset_in_archive`
    optimizer     `single_optimizers`, `optimized_parameters`, `owned_ranges`, `owned_states`, `owner_group`

`tests/unit/checkpoint/state/test_private_api.py` checks every assumption made here against the installed releases.
Other modules import from the public part only: `dist_checkpointing.save` and `load`, `mapping.ShardedTensor`,
`ShardedObject` and `ShardedTensorFactory` of mcore, and torch.distributed.checkpoint's metadata, planner and storage.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException as CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_v2pe.core.env import without_variable

StorageInfo = _StorageInfo
"""Where a shard is in a folder: relative_path, offset, length; pickled into `.metadata` under torch's own name."""


def expand_factories(sharded_state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A copy in which factories (gate and up) are replaced by the shards they build, and those factories."""
    expanded, _, factories = load_preprocess(sharded_state_dict)
    return expanded, factories


def merge_factories(loaded: dict[str, Any], factories: dict[str, Any]) -> dict[str, Any]:
    """Undo `expand_factories` for a loaded state dict: what a factory's shards hold becomes one tensor again."""
    return apply_factory_merges(loaded, factories)


def shards_in(sharded_state_dict: dict[str, Any]) -> list[ShardedTensor]:
    """All sharded tensors of a nested state dict; those that factories would build are not among them."""
    return [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]


def built_shards(factory: ShardedTensorFactory) -> list[ShardedTensor]:
    """The shards that one factory builds."""
    return list(nested_values(factory.build()))


def map_shards(act: Callable[[Any], Any], sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace every value of a nested state dict by `act` of it, in place."""
    return dict_list_map_inplace(act, sharded_state_dict)


def is_written_here(shard: ShardedTensor) -> bool:
    """Whether this rank is the one of all that hold the shard which writes it."""
    return bool(is_main_replica(shard.replica_id))


class _PlanInsteadOfSave(TorchDistSaveShardedStrategy):
    """Calls a function where mcore's own strategy would write tensors and objects.

    Derived from the class whose instances mcore 0.19 keeps; of any other it would make its own.
    """

    def __init__(self, plan: Callable[[dict[str, Any]], None]) -> None:
        super().__init__("torch_dist", 1)
        self._plan = plan

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Called by mcore when its checks are done.

        mcore 0.19 gives the plain values along, as one object; 0.16 writes them to `common.pt`, as is done here.
        """
        common = sharded_state_dict.pop("common_state", None)
        if common is not None and torch.distributed.get_rank() == 0:
            torch.save(common.data, Path(checkpoint_dir) / "common.pt")
        self._plan(sharded_state_dict)


def save_through_plan(
    sharded_state_dict: dict[str, Any],
    folder: Path,
    plan: Callable[[dict[str, Any]], None],
    *,
    is_checked: bool,
) -> None:
    """mcore's save, except that `plan` gets the tensors and objects that mcore would write. Collective.

    mcore expands factories, writes plain values (`common.pt`) and the name of the format (`metadata.json`).

    Args:
        sharded_state_dict: tensors, objects and plain values; factories are replaced in place.
        folder: where mcore writes.
        plan: gets the nested state dict of shards and objects.
        is_checked: mcore checks that all ranks together write every element once.
    """
    dist_checkpointing.save(
        sharded_state_dict, str(folder), _PlanInsteadOfSave(plan), validate_access_integrity=is_checked
    )


def loaded_object(stream: Any) -> Any:
    """An object of torch.save, read with `weights_only`: no code of the stream is run.

    Raises:
        pickle.UnpicklingError: it names what is not allowed, or is damaged.
    """
    return torch.load(stream, map_location="cpu", weights_only=True)


class _SafePlanner(MCoreLoadPlanner):
    """mcore's planner; torch's part of it would unpickle objects with everything that they ask for."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Called by torch's reader with the bytes of an object."""
        clean = io.BytesIO()
        torch.save(loaded_object(value), clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)


@contextmanager
def _metadata_from(metadata: Metadata) -> Iterator[None]:
    """mcore's strategy gets its metadata from here, and never opens `.metadata` itself."""

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata

    def reader(checkpoint_dir: str | Path, *args: Any, **kwargs: Any) -> FileSystemReader:
        return Reader(checkpoint_dir)

    with (
        patch.object(torch_strategy, "_get_filesystem_reader", reader),
        patch.object(torch_strategy, "MCoreLoadPlanner", _SafePlanner),
        # common.pt is read by torch.load, whose default this variable turns off.
        without_variable("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    ):
        yield


def load_through(sharded_state_dict: dict[str, Any], folder: Path, metadata: Metadata) -> dict[str, Any]:
    """mcore's load, except that it runs nothing that the folder contains. Collective.

    Args:
        sharded_state_dict: what is asked for.
        folder: a state folder.
        metadata: of that folder, read by `metadata_file.read_metadata`; mcore would unpickle it.
    """
    with _metadata_from(metadata):
        return dist_checkpointing.load(sharded_state_dict, str(folder))


def torch_state(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
    """mcore's shards and objects as the state dict that torch.distributed.checkpoint plans, by state key."""
    shards, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
    return mcore_to_pyt_state_dict(shards)


def save_planner() -> MCoreSavePlanner:
    """mcore's planner, with the global plan made on rank 0; the decentralized one needs mcore's own writer."""
    return MCoreSavePlanner(flatten_state_dict=False, can_run_decentralized_global_plan=False)


def all_ranks() -> _DistWrapper:
    """torch's collectives of objects over all ranks, which raise an exception of one rank on every rank."""
    return _DistWrapper(None, True, 0)


def failures_of(error: BaseException) -> list[BaseException]:
    """The exceptions of the ranks in torch's CheckpointException; for another error, that error alone."""
    failures = getattr(error, "failures", {0: (error, None)})
    return [cause for cause, _ in failures.values()]


def offset_in_archive(stream: BinaryIO, record: str) -> int:
    """Where the bytes of a record begin in a file of torch.save, from the start of the stream."""
    archive: Any = torch._C.PyTorchFileReader(stream)  # type: ignore[arg-type]
    return int(archive.get_record_offset(record))


def single_optimizers(optimizer: Any) -> list[Any]:
    """The distributed optimizers of which mcore's optimizer is a chain, with equal step counts; itself if it is one."""
    singles = list(getattr(optimizer, "chained_optimizers", [optimizer]))
    if len(singles) > 1:
        optimizer._synchronize_steps()
    return singles


def optimized_parameters(single: Any) -> list[Tensor]:
    """Parameters that a distributed optimizer updates, in the order of its buffers, equal on all its ranks."""
    return [parameter for buffer in single.buffers for parameter in buffer.param_index_map]


def owned_ranges(single: Any) -> dict[Tensor, tuple[int, int]]:
    """Parameter -> the elements [start, stop) of it, flattened, that this rank updates; absent if there are none."""
    return {
        parameter: (ranges["param"].start, ranges["param"].end)
        for buffer in single.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    }


def owned_states(single: Any, parameter: Tensor) -> dict[str, Tensor]:
    """Name -> values of a parameter's optimizer state (`param`, `exp_avg`, `exp_avg_sq`) in its owned range, flat."""
    states = single._get_main_param_and_optimizer_states(parameter)
    return {name: values for name, values in states.items() if name != "step"}


def owner_group(single: Any) -> ProcessGroup:
    """The ranks over which a distributed optimizer shares its parameters out."""
    return single.data_parallel_group
