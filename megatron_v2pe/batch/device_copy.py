"""Host arrays to a device in one copy that the host does not wait for.

    arrays (tokens, labels, indices, ...) --side by side in one pinned block--> one copy --> views on the device

A copy from ordinary memory makes the host wait for everything that the GPU still has to do. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 256  # bytes; what CUDA's allocator aligns to


def to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Tensors on the device with the arrays' shapes, dtypes and numbers; on a CPU they share the arrays' memory."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    # torch's allocator of pinned memory reuses the block no earlier than the copy is done.
    block = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for start, array in zip(starts, arrays, strict=True):
        if array.nbytes:
            target = block.numpy()[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(target, array)
    whole = block.to(device, non_blocking=True)
    return [
        whole[start : start + array.nbytes].view(_torch_dtype(array)).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


def _torch_dtype(array: NDArray[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
