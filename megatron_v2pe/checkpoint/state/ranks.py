"""Collectives of a checkpoint: one rank acts, all ranks act, and an error of one is raised on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import V2PEError

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return dist.get_rank(), dist.get_world_size()


def any_in_group(flags: Sequence[bool], group: dist.ProcessGroup) -> list[bool]:
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


def on_first_rank(act: Callable[[], T]) -> T:
    """Run `act` on rank 0 while the others wait; all get its result, or all raise its error. Collective."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = act()
        except Exception as error:  # broadcast below, so that no rank waits for this one
            failure = error
    outcome: list[Any] = [result, _as_sent(failure)]
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
    except Exception as error:  # gathered below, so that no rank waits for this one
        failure = error
    elsewhere = [error for error in gather_from_ranks(_as_sent(failure)) if error is not None]
    if failure is not None or elsewhere:
        raise failure or elsewhere[0]
    return result  # type: ignore[return-value]


def _as_sent(failure: Exception | None) -> Exception | None:
    """V2PE errors as they are, the rest as text: an exception of a library may not survive pickling."""
    return failure if failure is None or isinstance(failure, V2PEError) else RuntimeError(repr(failure))


@contextmanager
def ensure_process_group() -> Iterator[None]:
    """A process group of this process alone where there is none, because mcore's checkpoints need one."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def launched_ranks() -> Iterator[None]:
    """The ranks that torchrun started, as a gloo process group; nothing for a process that was started alone.

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
