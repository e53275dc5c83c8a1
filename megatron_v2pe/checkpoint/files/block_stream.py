"""Large files, written in blocks: reading, hashing, writing and flushing to the disk overlap.

    caller   fill a free buffer   1 2 3 4 ...
    hash        SHA-256             1 2 3 ...      hashlib and the system calls
    write       pwrite              1 2 3 ...      release the GIL
    flush          fdatasync every 256 MiB

Memory is `NUM_BUFFERS` blocks, whatever the size of the file. Flushing on the way matters most: a disk that starts to
write only after the last pwrite idles half of the time.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20
NUM_BUFFERS = 4
FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Block:
    """Bytes that do not exist yet.

    Attributes:
        num_bytes: size of the buffer that `fill` needs.
        fill: gets the buffer, uint8 [num_bytes]; returns what to write, uint8, in the buffer or elsewhere.
    """

    num_bytes: int
    fill: Callable[[Tensor], Tensor]


@dataclass
class _Slot:
    memory: Tensor
    tasks: list[Future[Any]] = field(default_factory=list)


@dataclass
class _File:
    descriptor: int
    running_hash: Any = None
    unflushed: int = 0


class BlockStream:
    """Files that are written one after another, each from its first byte to its last.

    Use it as a context manager: its end waits until everything is on the disk; an exception stops the threads and
    leaves the files as they are. An error of a thread is raised by a later call or at the end.

    Args:
        block_bytes: size of a buffer; one that is too small for a block grows.
        num_buffers: blocks that may be in flight at a time.
    """

    def __init__(self, *, block_bytes: int = BLOCK_BYTES, num_buffers: int = NUM_BUFFERS) -> None:
        self.position = 0
        self._slots = deque(_Slot(torch.empty(block_bytes, dtype=torch.uint8)) for _ in range(num_buffers))
        self._writer, self._hasher, self._flusher = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "hash", "flush")
        )
        self._tasks: deque[Future[Any]] = deque()
        self._flushes: deque[Future[Any]] = deque()
        self._open: set[int] = set()
        self._file: _File | None = None

    def __enter__(self) -> BlockStream:
        return self

    def open(self, path: Path, *, is_hashed: bool = False) -> None:
        """Write to this file from its start; it is created if it does not exist, and never truncated."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._open.add(descriptor)
        self._file = _File(descriptor, hashlib.sha256() if is_hashed else None)
        self.position = 0

    def put_blocks(self, blocks: Iterable[Block]) -> None:
        """Fill and write blocks, in order."""
        for block in blocks:
            slot = self._free_slot(block.num_bytes)
            slot.tasks = self._send(block.fill(slot.memory[: block.num_bytes]).numpy().data)

    def put(self, data: bytes | memoryview) -> None:
        """Write bytes that must not change any more."""
        self._send(memoryview(data))

    def close(self) -> Future[str]:
        """Finish the current file; the result is its SHA-256, empty when it is not hashed."""
        file = self._file
        assert file is not None, "open a file first"
        self._file = None
        self._tasks.append(self._writer.submit(self._finish, file))
        return self._hasher.submit(lambda: file.running_hash.hexdigest() if file.running_hash else "")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for pool in (self._writer, self._hasher, self._flusher):  # the writer feeds the flusher
                pool.shutdown(wait=True, cancel_futures=error is not None)
            if error is None:
                for task in (*self._tasks, *self._flushes):
                    task.result()
        finally:
            for descriptor in self._open:
                os.close(descriptor)

    def _free_slot(self, num_bytes: int) -> _Slot:
        """The buffer that has been in flight the longest, once its bytes are written and hashed."""
        slot = self._slots.popleft()
        self._slots.append(slot)
        for task in slot.tasks:
            task.result()
        if slot.memory.numel() < num_bytes:
            slot.memory = torch.empty(num_bytes, dtype=torch.uint8)
        return slot

    def _send(self, data: memoryview) -> list[Future[Any]]:
        file = self._file
        assert file is not None, "open a file first"
        tasks = [self._writer.submit(self._write, file, data, self.position)]
        if file.running_hash is not None:
            tasks.append(self._hasher.submit(file.running_hash.update, data))
        self.position += len(data)
        self._tasks.extend(tasks)
        while self._tasks and self._tasks[0].done():  # errors surface early, and the list stays short
            self._tasks.popleft().result()
        return tasks

    def _write(self, file: _File, data: memoryview, position: int) -> None:
        file.unflushed += len(data)
        while data:
            done = os.pwrite(file.descriptor, data, position)
            data, position = data[done:], position + done
        is_flushing = self._flushes and not self._flushes[-1].done()
        if file.unflushed >= FLUSH_BYTES and not is_flushing:
            file.unflushed = 0
            self._flushes.append(self._flusher.submit(os.fdatasync, file.descriptor))

    def _finish(self, file: _File) -> None:
        self._flushes.append(self._flusher.submit(self._sync_and_close, file.descriptor))

    def _sync_and_close(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self._open.discard(descriptor)
        os.close(descriptor)


def memory_blocks(
    tensor: Tensor, *, block_bytes: int = BLOCK_BYTES, is_snapshot: bool = False
) -> Iterator[Block]:
    """A tensor of any device, shape and strides, as blocks of its rows.

    Args:
        tensor: what is written.
        block_bytes: size of a block.
        is_snapshot: it is contiguous, in host memory and does not change until it is written: nothing is copied.
    """
    if is_snapshot:
        yield from _snapshot_blocks(tensor, block_bytes)
        return
    rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    row_bytes = rows[:1].numel() * rows.itemsize
    if rows.numel() == 0:
        return
    step = max(1, block_bytes // row_bytes)
    for start in range(0, rows.shape[0], step):
        source = rows[start : start + step]

        def fill(memory: Tensor, source: Tensor = source) -> Tensor:
            memory.view(source.dtype).view(source.shape).copy_(source)
            return memory

        yield Block(source.numel() * source.itemsize, fill)


def _snapshot_blocks(tensor: Tensor, block_bytes: int) -> Iterator[Block]:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    for start in range(0, data.numel(), block_bytes):

        def fill(memory: Tensor, source: Tensor = data[start : start + block_bytes]) -> Tensor:
            return source

        yield Block(0, fill)
