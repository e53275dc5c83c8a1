"""Byte ranges of files, read straight into tensors that exist already.

A memory map would be less code, but its pages count as memory of this process while it is open: a checkpoint of 16 GB
would look like 16 GB in use, and be charged so under a container's limit.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import torch
from torch import Tensor


class RangeReader:
    """Reads from the files of one folder; descriptors close with the object.

    Args:
        folder: the folder that file names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)

    def read_into(self, out: Tensor, *, file: str, offset: int) -> None:
        """Fill a contiguous tensor with the bytes from `offset` on.

        Args:
            out: of any dtype and shape; its bytes are overwritten.
            file: name in the folder.
            offset: bytes from the start of the file.

        Raises:
            OSError: the file cannot be read, or ends too early.
        """
        if out.numel() == 0:
            return
        memory = out.reshape(-1).view(torch.uint8).numpy().data
        descriptor = self._descriptor(file)
        while memory:
            got = os.preadv(descriptor, [memory], offset)
            if got == 0:
                raise OSError(None, f"ends {len(memory)} bytes too early", str(self.folder / file))
            memory, offset = memory[got:], offset + got

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.folder / file, os.O_RDONLY)
        return self._descriptors[file]


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
