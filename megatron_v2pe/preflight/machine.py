"""What each rank runs on: device, free memory, versions, clock."""

from __future__ import annotations

import shutil
import subprocess
import time

import torch
import torch.distributed as dist

from megatron_v2pe.assembly.environment import describe_environment
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.preflight.findings import Finding

VERSIONS = ("python", "torch", "cuda", "nccl", "transformer engine", "apex", "megatron-core")
MIN_FREE_SHARE = 0.95  # our own context needs less than 1 GiB; another process needs more
MAX_SKEW_S = 60.0  # files seem to come from the future, and the names of logs mislead
NOTED_SKEW_S = 1.0


def check_gpu_count() -> None:
    """Every rank of a node needs a GPU of its own, where there are any. Before any collective.

    Raises:
        ConfigError: more ranks than GPUs.
    """
    count, local_rank = torch.cuda.device_count(), launcher().local_rank
    if torch.cuda.is_available() and local_rank >= count:
        raise ConfigError(
            f"this node shows {count} GPUs, but a rank {local_rank} of it was started; start as many ranks as GPUs "
            "(torchrun --nproc-per-node, ranks_per_node of the cluster file), or ask for more GPUs"
        )


def check_device(device: torch.device) -> Finding:
    """Kind, memory and driver; another process on the GPU is a no-go."""
    if device.type != "cuda":
        return Finding(name="device", verdict="go", text="CPU; ranks talk over gloo")
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    text = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, driver {_driver()}"
    if free < MIN_FREE_SHARE * total:
        text += ": another process holds memory of it (nvidia-smi lists them)"
        return Finding(name="device", verdict="no-go", text=text)
    return Finding(name="device", verdict="go", text=text)


def _driver() -> str:
    path = shutil.which("nvidia-smi")
    if path is None:
        return "not known (no nvidia-smi)"
    command = [path, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.split("\n")[0].strip() or "not known"


def check_versions() -> Finding:
    """The same software on all ranks. Collective."""
    found = dict(describe_environment())
    mine = {name: found[name].partition(",")[0] if name == "torch" else found[name] for name in VERSIONS}
    all_ranks: list[dict[str, str]] = [mine] * dist.get_world_size()
    dist.all_gather_object(all_ranks, mine)
    return compare_versions(all_ranks)


def compare_versions(all_ranks: list[dict[str, str]]) -> Finding:
    """Finding of the versions of each rank."""
    first = all_ranks[0]
    for rank, other in enumerate(all_ranks):
        differing = [name for name in first if first[name] != other[name]]
        if differing:
            name = differing[0]
            text = (
                f"{name}: rank 0 has {first[name]}, rank {rank} has {other[name]}; use one image everywhere"
            )
            return Finding(name="versions", verdict="no-go", text=text)
    shown = ("torch", "megatron-core", "transformer engine", "apex")
    text = "; ".join(f"{name} {first[name].partition(' (')[0]}" for name in shown)
    return Finding(name="versions", verdict="go", text=text)


def check_clocks(device: torch.device, *, tries: int = 10) -> Finding:
    """Spread of the ranks' clocks, the smallest of several measurements after a barrier. Collective."""
    spreads = []
    for _ in range(tries):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        everyone = [torch.zeros_like(now) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, now)
        times = torch.cat(everyone)
        spreads.append(float(times.max() - times.min()))
    return judge_skew(min(spreads))


def judge_skew(seconds: float) -> Finding:
    """Finding of the spread of clocks."""
    verdict = "no-go" if seconds > MAX_SKEW_S else "note" if seconds > NOTED_SKEW_S else "go"
    text = f"within {seconds:.3g} s of each other"
    if verdict != "go":
        text += "; let the nodes set their clocks (chrony, ntp)"
    return Finding(name="clocks", verdict=verdict, text=text)  # type: ignore[arg-type]
