"""Layer inputs in host memory between forward and backward, copied beside the computation.

    forward    layer i: its input --copy stream--> pinned block            the next layer computes meanwhile
    backward   layer i: waits for its input; the input of layer i - 1 is on its way back already

`torch.autograd.graph.save_on_cpu` makes the host wait at each copy, and moves everything that is kept inside it, small
tensors and the final norm's float32 copy included. Here only what enters a recomputed layer is moved.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 20  # smaller tensors stay: angles, boundaries, generator states
_AHEAD = 1  # inputs that are brought back before they are asked for


class _Moved:
    """A tensor in host memory; its place in the order of a forward pass."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, number: int) -> None:
        self.number = number
        self.device = tensor.device
        self.stream = stream
        self.there: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy is done

    def start(self) -> None:
        """Begin to bring it back, once."""
        if self.there is not None:
            return
        # Made on the computing stream, which uses it.
        self.there = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.there.copy_(self.host, non_blocking=True)
            self.arrived = self.stream.record_event()
        self.there.record_stream(self.stream)

    def take(self) -> Tensor:
        """The tensor on the device; the computing stream waits for it, the host does not."""
        self.start()
        assert self.there is not None
        assert self.arrived is not None
        torch.cuda.current_stream().wait_event(self.arrived)
        found, self.there = self.there, None
        return found


class ActivationOffload:
    """Context of a forward pass in which large tensors kept for backward are moved to the host; reusable.

    `paused` leaves what is kept on the device; the model sets it for what is not a layer.

    Args:
        smallest_bytes: smaller tensors stay on the device.
    """

    def __init__(self, *, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.paused = False
        self._smallest_bytes = smallest_bytes
        self._stream: torch.cuda.Stream | None = None
        self._moved: WeakValueDictionary[int, _Moved] = WeakValueDictionary()  # autograd's graph owns them
        self._count = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> ActivationOffload:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self.paused = False
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        if self.paused or not tensor.is_cuda or tensor.nbytes < self._smallest_bytes:
            return tensor
        assert self._stream is not None
        moved = _Moved(tensor, self._stream, self._count)
        self._moved[self._count] = moved
        self._count += 1
        return moved

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Moved):
            return kept
        found = kept.take()
        for number in range(kept.number - 1, kept.number - 1 - _AHEAD, -1):
            if number in self._moved:
                self._moved[number].start()
        return found
