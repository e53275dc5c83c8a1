"""Saving sharded state in steps, so that the long ones can run while training continues.

    plan       all ranks   mcore's checks, torch's plan: who writes which box into which file; common.pt
    (copy)     each rank   its tensors to host memory, after which training may change them
    write      each rank   its file, hashed on the way; no collective, so any thread may run it
    join       all ranks   report to rank 0 what was written; an error of one is raised on all
    complete   rank 0      `.metadata`; no collective

mcore's own asynchronous writer copies every view once more, forks, and starts a manager process
(docs/decisions/0023). Its checks and plan are kept here, but the data goes through `StreamingWriter`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_v2pe.checkpoint.state.host_memory import HostCopy
from megatron_v2pe.checkpoint.state.private_api import (
    all_ranks,
    failures_of,
    save_planner,
    save_through_plan,
    torch_state,
)
from megatron_v2pe.checkpoint.state.ranks import ensure_process_group, on_first_rank
from megatron_v2pe.checkpoint.state.writer import ShardKey, Shards, StreamingWriter, item_key
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import free_space


@dataclass(frozen=True)
class KnownPlan:
    """What all ranks agreed on in a save, for the next one of the same state.

    Attributes:
        asked: items that this rank has.
        own: items that the global plan assigns to this rank: copies are written by one rank only.
        metadata: of the whole, on rank 0.
    """

    asked: SavePlan
    own: SavePlan
    metadata: Metadata | None


_Written = tuple[list[WriteResult], dict[str, str]]
"""Where a rank's items are in its files, and the files' hashes."""


def save_state(
    folder: Path,
    sharded_state_dict: dict[str, Any],
    *,
    unread: Shards | None = None,
    file_of: Mapping[ShardKey, str] | None = None,
) -> dict[str, str]:
    """Write a sharded state dict into `folder`, which exists and is empty. Collective; see `StateSave`.

    Returns:
        SHA-256 of the files with tensors, of all ranks, by name.

    Raises:
        CheckpointError: a rank could not write (raised on all).
    """
    with ensure_process_group():
        save = StateSave(folder, sharded_state_dict, unread=unread, file_of=file_of)
        save.write()
        save.join()
        return on_first_rank(save.complete)


class StateSave:
    """One save, planned when it is made; making it is collective.

    Then `write` on every rank, with `copy_tensors` before it when tensors may change in the meantime, then `join`, then
    `complete` on rank 0.

    Args:
        folder: a folder that all ranks see, empty.
        sharded_state_dict: mcore's ShardedTensor, ShardedObject, factories; plain values are stored once.
        unread: bytes of shards whose `data` is a meta tensor.
        file_of: see `StreamingWriter`.
        known: `known` of an earlier save. Where all ranks have the same items as then, the checks and the global plan,
            which are slow with many ranks, are skipped.

    Raises:
        CheckpointError: shards do not make up their tensors, or the folder cannot be written; on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        sharded_state_dict: dict[str, Any],
        *,
        unread: Shards | None = None,
        file_of: Mapping[ShardKey, str] | None = None,
        known: KnownPlan | None = None,
    ) -> None:
        self._folder = folder
        self._writer = StreamingWriter(folder, unread=unread, file_of=file_of)
        self._plan = _Plan(self._writer)
        self._outcome: _Written | BaseException | None = None
        self._joined: list[_Written] = []
        with _as_checkpoint_error(folder):
            save_through_plan(
                sharded_state_dict,
                folder,
                lambda shards: self._plan.make(shards, earlier=known),
                is_checked=known is None,
            )

    @property
    def known(self) -> KnownPlan:
        """For the next save of this state."""
        return self._plan.known

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this rank writes."""
        return sum(tensor.numel() * tensor.itemsize for _, tensor in self._plan.tensors())

    def copy_tensors(self, memory: HostCopy) -> None:
        """Write from a copy; the tensors may change as soon as this returns.

        Args:
            memory: receives the copy; must not be used for another one until `write` is done.
        """
        found = {item_key(item): tensor for item, tensor in self._plan.tensors()}
        self._plan.copies = dict(zip(found, memory.copy(list(found.values())), strict=True))
        self._writer.is_snapshot = True

    def write(self, *, cancelled: threading.Event | None = None) -> None:
        """Write this rank's files. Not collective; an error is kept for `join`.

        Args:
            cancelled: when it is set, writing ends soon, and `join` raises.
        """
        self._writer.cancelled = cancelled
        try:
            written = self._writer.write_data(self._plan.known.own, self._plan).wait()
            self._outcome = written, self._writer.hashes
        except BaseException as error:  # raised on all ranks by `join`
            self._outcome = error

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write."""
        return isinstance(self._outcome, BaseException)

    def join(self) -> None:
        """Report to rank 0 what all ranks wrote. Collective; every rank has returned from `write`.

        Raises:
            CheckpointError: a rank could not write (raised on all).
        """
        with _as_checkpoint_error(self._folder):
            all_ranks().all_reduce("write", self._own_outcome, self._joined.extend)

    def complete(self) -> dict[str, str]:
        """Write `.metadata`, on rank 0. Not collective.

        Returns:
            SHA-256 of the files with tensors, of all ranks, by name.

        Raises:
            CheckpointError: it cannot be written.
        """
        metadata = self._plan.known.metadata
        assert metadata is not None, "on rank 0, after `join`"
        with _as_checkpoint_error(self._folder):
            self._writer.finish(metadata, [results for results, _ in self._joined])
        return {name: digest for _, hashes in self._joined for name, digest in hashes.items()}

    def _own_outcome(self) -> _Written:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None, "write first"
        return self._outcome


class _Plan:
    """torch's plan over mcore's shards: which rank writes what into which file.

    Attributes:
        known: what is written by whom.
        copies: tensors to be written instead of those of the state dict.
    """

    known: KnownPlan

    def __init__(self, writer: StreamingWriter) -> None:
        self._writer = writer
        self._planner = save_planner()
        self.copies: dict[ShardKey, torch.Tensor] = {}

    def make(self, sharded_state_dict: dict[str, Any], *, earlier: KnownPlan | None) -> None:
        """Plan, or use the plan of an earlier save where all ranks have the same items. Collective."""
        state = torch_state(sharded_state_dict)
        ranks = all_ranks()
        asked = SavePlan([])
        metadata = None

        def of_this_rank() -> SavePlan:
            nonlocal asked
            self._planner.set_up_planner(state, storage_meta=None, is_coordinator=ranks.is_coordinator)
            self._writer.set_up_storage_writer(ranks.is_coordinator, rank=ranks.rank, use_collectives=True)
            asked = self._writer.prepare_local_plan(self._planner.create_local_plan())
            return asked

        def of_all(plans: list[SavePlan]) -> list[SavePlan]:
            nonlocal metadata
            plans, metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        if earlier and all(ranks.all_gather("plan", lambda: of_this_rank().items == earlier.asked.items)):
            self._planner.finish_plan(earlier.own)
            self.known = earlier
        else:
            own = self._planner.finish_plan(ranks.reduce_scatter("plan", of_this_rank, of_all))
            self.known = KnownPlan(asked, own, metadata)

    def tensors(self) -> list[tuple[WriteItem, torch.Tensor]]:
        """Tensors of this rank, in the order in which they are written."""
        items = [item for item in self.known.own.items if item.type != WriteItemType.BYTE_IO]
        return [(item, self.resolve_data(item)) for item in items]

    def resolve_data(self, item: WriteItem) -> Any:
        """A tensor, or the bytes of an object (the writer asks)."""
        copy = self.copies.get(item_key(item))
        return self._planner.resolve_data(item) if copy is None else copy


@contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointException, OSError) as error:
        _let_interrupt_through(error)
        raise CheckpointError(
            f"{folder}: cannot be written ({_reason(error)}); {free_space(folder)}. Earlier checkpoints are as they "
            "were; make room or raise the quota, and start again"
        ) from error


def _let_interrupt_through(error: BaseException) -> None:
    """Raise the KeyboardInterrupt of a rank, which torch's checkpointing turns into an error of its own."""
    if any(isinstance(cause, KeyboardInterrupt) for cause in failures_of(error)):
        raise KeyboardInterrupt from error


def _reason(error: BaseException) -> str:
    """The errors of the ranks in one line, without the traces that torch adds; a CheckpointError as it is."""
    reasons = {f"{type(cause).__name__}: {cause}" for cause in failures_of(error)}
    return "; ".join(sorted(reasons))
