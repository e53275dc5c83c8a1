"""How long this rank waits in communication, measured in torch.distributed itself, so megatron-core's calls count too.

    within `measured`:   group.allreduce(...)  ->  Work     issue        (timed on CUDA)
                         Work.wait()                        wait         (timed)
    outside of it torch is untouched

Every collective, send and receive of Python ends in `Work.wait`, also megatron-core's and those that return a handle;
that method is replaced while a step is measured. What the number means depends on the device:

- CPU (gloo): seconds of the main thread inside `Work.wait`: until the other ranks have called and the bytes have
  moved. Other threads do the work, so a rank that is last in every call waits for almost nothing.
- CUDA (NCCL): `Work.wait` only makes the stream wait, and newer torch runs a blocking collective on the current stream,
  so host time says nothing. Instead an event is recorded on the current stream before and after each call and each
  wait; the time between the two on the device is how long that stream waited: for the other ranks' kernels, then for
  the bytes. Communication that overlaps with computation is not counted; a wait of two streams at once counts twice.
  Events cost microseconds each and reading them waits for the device, so only one step in `CUDA_EVERY` is
  measured. This has not been run on several GPUs yet.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

CUDA_EVERY = 10

_ISSUING = (  # names of torch 2.6 and those of 2.13
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier"),
    *("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced"),
    *("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    *("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
    *("alltoall", "alltoall_base", "all_to_all_single", "send", "recv", "recv_anysource", "_end_coalescing"),
)


class CommClock:
    """Sums the communication wait of a step.

    Args:
        device: of this rank; decides what is measured, see the module.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[Any] = []

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Measure the calls within the block; read `seconds` after it."""
        self._spans.clear()
        if self._is_cuda and step % CUDA_EVERY:
            yield
            return
        methods: list[tuple[type, str]] = [(dist.Work, "wait")]
        if self._is_cuda:
            methods += [(dist.ProcessGroup, name) for name in _ISSUING if name in vars(dist.ProcessGroup)]
        # From the class's own dictionary: what getattr returns of a compiled class would not bind when put back.
        originals = [(owner, name, vars(owner)[name]) for owner, name in methods]
        around = self._around_on_device if self._is_cuda else self._around_on_host
        for owner, name, original in originals:
            setattr(owner, name, around(original))
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def seconds(self) -> float:
        """Wait of the last step; NaN where it was not measured. On CUDA this waits for the device."""
        if not self._is_cuda:
            return math.fsum(self._spans)
        if not self._spans:
            return math.nan
        torch.cuda.synchronize()
        return math.fsum(before.elapsed_time(after) for before, after in self._spans) / 1000.0

    def _around_on_host(self, original: Callable[..., Any]) -> Callable[..., Any]:
        spans, now = self._spans, time.perf_counter

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return original(*args, **kwargs)
            finally:
                spans.append(now() - started)

        return timed

    def _around_on_device(self, original: Callable[..., Any]) -> Callable[..., Any]:
        spans = self._spans

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = torch.cuda.Event(enable_timing=True)
            after = torch.cuda.Event(enable_timing=True)
            before.record()
            try:
                return original(*args, **kwargs)
            finally:
                after.record()
                spans.append((before, after))

        return timed
