"""One process as any rank of a world that was never started: for planning and for checking layouts.

    with fake_world(plan, rank=37) as context:     # 256 ranks, one process, seconds
        ...                                       # build on the meta device; nothing is computed or sent

torch's `fake` back end returns from every collective at once with whatever is in the buffers: groups, ranks and
shapes are right and numbers are not. Nothing here may be mixed with a real world: the block refuses to start inside
one, and where megatron-core would find a CUDA device to allocate on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the back end

from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.runtime.cpu_runtime import device_of_mcore
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed


@contextmanager
def fake_world(plan: ParallelPlan, *, rank: int) -> Iterator[ParallelContext]:
    """Be rank `rank` of `plan`; tensors made inside the block are on the meta device and use no memory.

    The default generator of this process keeps its state.

    Raises:
        RuntimeError: this process belongs to a real world, or sees a GPU.
        ValueError: the plan has no such rank.
    """
    if dist.is_initialized():
        raise RuntimeError("a fake world cannot be made inside a process group; use a process of its own")
    if torch.cuda.is_available():
        raise RuntimeError(
            "a fake world allocates nothing, but megatron-core would use this GPU; hide it: CUDA_VISIBLE_DEVICES="
        )
    if not 0 <= rank < plan.world_size:
        raise ValueError(f"rank {rank} of a plan for {plan.world_size} ranks")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    try:
        with torch.random.fork_rng(devices=[]):
            context = init_distributed(plan, seed=0)
        with device_of_mcore("meta"), torch.device("meta"):
            yield ParallelContext(plan, replace(context.ranks, device=torch.device("meta")))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
