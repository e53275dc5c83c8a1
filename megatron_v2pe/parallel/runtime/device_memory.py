"""Memory that is free where this rank computes."""

from __future__ import annotations

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that may still be allocated: of the GPU with what torch holds unused, or of the host.

    Ranks on one host share it; each of them sees all that is free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available
