"""Numbers of all ranks under their names: one collective, however many numbers there are.

{name: this rank's values} --sum_by_name--> {name: sums over a group}             equal on every rank of the group
{name: this rank's value}  --gather_by_name--> {name: (rank 0's, rank 1's, ...)}  equal on every rank of the world
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.batch.device_copy import to_device
from megatron_v2pe.parallel.topology import Ranks


def sum_by_name(
    values: Mapping[str, Tensor | float], *, device: torch.device, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Sum numbers or tensors over the ranks of a group. Collective.

    Args:
        values: the same names and shapes on every rank of the group; added up in float64.
        device: where the collective takes place.
        group: the world when None.

    Returns:
        float64 tensors of the same shapes, in host memory.
    """
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    if dist.get_world_size(group) > 1:
        if flat.device.type == "cpu":
            (flat,) = to_device([flat.numpy()], device)
        dist.all_reduce(flat, group=group)
    sums = flat.cpu().split([tensor.numel() for tensor in tensors.values()])
    return {
        name: total.view(tensor.shape) for (name, tensor), total in zip(tensors.items(), sums, strict=True)
    }


def gather_by_name(values: Mapping[str, float], *, ranks: Ranks) -> dict[str, tuple[float, ...]]:
    """Every rank's number, by rank. Collective over the world: a sum of rows that are zero on all other ranks.

    Args:
        values: the same names on every rank.
        ranks: this rank's place.
    """
    rows = {name: torch.zeros(ranks.world_size, dtype=torch.float64) for name in values}
    for name, value in values.items():
        rows[name][ranks.rank] = value
    return {name: tuple(row.tolist()) for name, row in sum_by_name(rows, device=ranks.device).items()}
