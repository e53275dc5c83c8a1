"""How fast ranks talk: a ring all-reduce over the world, and each rank sending to the next.

Rates are GB/s (10^9 bytes) that one rank sends. An all-reduce of b bytes over n ranks sends 2 (n - 1) / n * b each.
Expected is what `planning.hardware` states for the GPU; of gloo no more than a slow Ethernet.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_v2pe.planning.request.hardware import GPUS, Hardware, group_gb_s, hop_gb_s
from megatron_v2pe.preflight.findings import Finding

GPU_BYTES, CPU_BYTES = 256 * 2**20, 8 * 2**20
GLOO_GB_S = 0.1  # a link of 1 Gbit/s
NOTED_SHARE, LEAST_SHARE = 0.5, 0.1
_WARM_UP, _TIMED = 2, 5


def known_hardware(device: torch.device) -> Hardware | None:
    """Stated numbers of this rank's GPU, None where there are none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((hardware for key, hardware in GPUS.items() if key in name), None)


def check_links(device: torch.device) -> list[Finding]:
    """Rates of both; nothing on one rank. Collective."""
    size = dist.get_world_size()
    if size == 1:
        return [Finding(name="links", verdict="note", text="one rank: not measured; start under torchrun")]
    hardware = known_hardware(device)
    if hardware is None:
        wanted = None if device.type == "cuda" else GLOO_GB_S
        reduce_gb_s = hop = wanted
    else:
        reduce_gb_s, hop = (rate(hardware, size=size, stride=1) for rate in (group_gb_s, hop_gb_s))
    numbers = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    sent = numbers.nbytes * 2 * (size - 1) / size
    reduced = sent / _slowest(lambda: dist.all_reduce(numbers), device) / 1e9
    passed = numbers.nbytes / _slowest(lambda: _pass_on(numbers), device) / 1e9
    return [judge_rate("all-reduce", reduced, reduce_gb_s), judge_rate("send/recv", passed, hop)]


def judge_rate(name: str, gb_s: float, expected: float | None) -> Finding:
    """Finding of a rate against what is expected of it."""
    if expected is None:
        text = f"{gb_s:.2f} GB/s a rank; nothing is stated for this GPU"
        return Finding(name=name, verdict="note", text=text)
    text = f"{gb_s:.2f} GB/s a rank, {expected:.2f} expected"
    if gb_s < LEAST_SHARE * expected:
        text += "; look for the wrong interface (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO)"
        return Finding(name=name, verdict="no-go", text=text)
    return Finding(name=name, verdict="go" if gb_s >= NOTED_SHARE * expected else "note", text=text)


def _pass_on(numbers: torch.Tensor) -> None:
    """Send to the next rank, receive from the one before."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(numbers)
    operations = [
        dist.P2POp(dist.isend, numbers, (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _slowest(operation: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of an operation on the slowest rank."""
    for _ in range(_WARM_UP):
        operation()
    _finish(device)
    start = time.perf_counter()
    for _ in range(_TIMED):
        operation()
    _finish(device)
    seconds = torch.tensor([(time.perf_counter() - start) / _TIMED], device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
