"""How long this rank stands in communication, read off torch.distributed itself, so megatron-core's calls count too.

    within `measured`:   group.allreduce(...)  ->  Work     issue        (timed on CUDA)
                         Work.wait()                        wait         (timed)
    outside of it torch is untouched

Every collective, send and receive of Python ends in `Work.wait`, also megatron-core's and those that return a handle;
that one method is replaced while a step is measured. What the number means depends on the device:

- CPU (gloo): seconds of the main thread inside `Work.wait`: until the other ranks had come and the bytes had moved. All
  of the work is done by other threads, so a rank that comes last to every call waits for next to nothing.
- CUDA (NCCL): `Work.wait` only makes the stream wait, and newer torch runs a blocking collective on the current stream,
  so host time says nothing. Instead an event is recorded on the current stream before and after each call and each
  wait; the time between the two on the device is how long that stream stood there: waiting for the other ranks'
  kernels, then moving bytes. What overlaps with computation is not in it; what two streams wait for at once is in it
  twice. Events cost microseconds each and reading them waits for the device, so only one step in `CUDA_EVERY` is
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
    """Adds up the communication wait of one step after the other.

    Args:
        device: of this rank; decides what is measured, see the module.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spans: list[Any] = []

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Measure what is called within the block; `seconds` tells it afterwards."""
        self._spans.clear()
        if self._is_cuda and step % CUDA_EVERY:
            yield
            return
        methods: list[tuple[type, str]] = [(dist.Work, "wait")]
        if self._is_cuda:
            methods += [(dist.ProcessGroup, name) for name in _ISSUING if name in vars(dist.ProcessGroup)]
        # As the class holds them: what getattr returns of a compiled class would not bind when it is put back.
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
        """Wait of the step that was measured last; NaN where it was not. On CUDA this waits for the device."""
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
