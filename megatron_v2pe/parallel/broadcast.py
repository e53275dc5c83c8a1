"""One rank's object on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def broadcast_object(obj: Any, *, device: torch.device | None = None) -> Any:
    """What rank 0 gave, on every rank of the world; pickled by us for us. Collective.

    Args:
        obj: rank 0's counts.
        device: of the transfer; the process group's default when None.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return obj
    held = [obj]
    dist.broadcast_object_list(held, src=0, device=device)
    return held[0]
