"""Host memory for a copy of a rank's state, and whether there is enough of it.

    tensors (GPU or host) --copy--> one block of bytes, made once, pinned where there is a GPU --> views, for the writer

The block is kept from save to save, because touching new memory costs as much as the copy, and pinning it much more. So
the first save needs all the memory that a run will ever need for saves, and checks whether it is available.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megatron_v2pe.checkpoint.state.ranks import gather_from_ranks

_ALIGNMENT = 512  # bytes; a multiple of every item size and of a cache line
_USABLE = 0.8  # of what is available now; loaders and the page cache need the rest
_UNLIMITED = 2**60


class HostCopy:
    """A block of host memory for copies of tensors, one set at a time.

    Args:
        is_pinned: page-locked, for copies from a GPU.
    """

    def __init__(self, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._block = torch.empty(0, dtype=torch.uint8)

    @property
    def num_bytes(self) -> int:
        """Size of the block so far."""
        return self._block.numel()

    def block_bytes(self, num_bytes: int) -> int:
        """Host memory of a block for `num_bytes`: torch rounds pinned blocks up to a power of two."""
        return 1 << max(num_bytes - 1, 0).bit_length() if self._is_pinned and num_bytes else num_bytes

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the tensors, contiguous, in host memory; earlier copies are overwritten."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
        if end > self.num_bytes:
            self._block = torch.empty(0, dtype=torch.uint8)  # release the old one first
            self._block = torch.empty(end, dtype=torch.uint8, pin_memory=self._is_pinned)
        copies = [self._view(start, tensor) for start, tensor in zip(starts, tensors, strict=True)]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return copies

    def _view(self, start: int, like: Tensor) -> Tensor:
        data = self._block[start : start + like.numel() * like.itemsize]
        return data.view(like.dtype).view(like.shape)


def shortage(num_bytes: int) -> str:
    """Which hosts lack memory for copies of `num_bytes` on each of their ranks, as a sentence; "" if none does.

    Collective; all ranks get the same text.

    Args:
        num_bytes: that this rank needs beyond what it has.
    """
    by_host: dict[str, tuple[int, int]] = {}
    for host, needed, available in gather_from_ranks((socket.gethostname(), num_bytes, available_bytes())):
        others, least = by_host.get(host, (0, _UNLIMITED))
        by_host[host] = others + needed, min(least, available)
    return "; ".join(
        f"ranks on {host} need {needed / 2**30:.2f} GiB of host memory for it; {available / 2**30:.2f} GiB are "
        f"available, of which {_USABLE:.0%} may be used"
        for host, (needed, available) in sorted(by_host.items())
        if needed > _USABLE * available
    )


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that this process may still allocate: the machine's, or what its cgroup (a job) leaves.

    Args:
        proc: where the kernel shows the process's cgroup.
        cgroups: where it shows their limits.
    """
    return min(psutil.virtual_memory().available, _left_in_cgroup(proc, cgroups))


def _left_in_cgroup(proc: Path, cgroups: Path) -> int:
    """Limit less usage without reclaimable page cache; the smallest of the group's and of those that contain it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return _UNLIMITED
    left = _UNLIMITED
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _V1 if controllers else _V2
        root = cgroups / "memory" if controllers else cgroups
        here = root / path.strip("/")
        left = min(
            [left, *(_left_in(folder, names) for folder in (here, *here.parents) if _is_in(folder, root))]
        )
    return left


_V2 = ("memory.max", "memory.current", "inactive_file ")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")


def _is_in(folder: Path, root: Path) -> bool:
    return folder == root or root in folder.parents


def _left_in(folder: Path, names: tuple[str, str, str]) -> int:
    limit_file, usage_file, reclaimable = names
    try:
        limit, usage = ((folder / name).read_text().strip() for name in (limit_file, usage_file))
        statistics = (folder / "memory.stat").read_text().splitlines()
    except OSError:  # no such group here: the container sees its own as the root
        return _UNLIMITED
    if limit == "max":
        return _UNLIMITED
    cached = sum(int(line.split()[1]) for line in statistics if line.startswith(reclaimable))
    return max(0, int(limit) - int(usage) + cached)
