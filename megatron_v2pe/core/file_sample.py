"""Digest of a file that reads little of a large one: its size, and blocks of bytes spread evenly over it."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO


def sampled_digest(file: BinaryIO, *, whole_bytes: int, blocks: int, block_bytes: int) -> str:
    """Size and digest of a file that is open for reading.

    Args:
        file: seekable.
        whole_bytes: a file of at most so many bytes is read whole.
        blocks: how many blocks of a larger file are read; the first and the last bytes are among them.
        block_bytes: bytes of a block.

    Returns:
        `SIZE bytes, sha256 HEX`.

    Raises:
        OSError: it cannot be read.
    """
    size = file.seek(0, io.SEEK_END)
    running = hashlib.sha256()
    if size <= whole_bytes:
        file.seek(0)
        running.update(file.read(size))
    else:
        for index in range(blocks):
            file.seek((size - block_bytes) * index // (blocks - 1))
            running.update(file.read(block_bytes))
    return f"{size} bytes, sha256 {running.hexdigest()[:16]}"
