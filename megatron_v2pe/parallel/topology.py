"""Which rank does what: this rank's place on each parallel axis, and the process groups.

Ranks are one grid, tp innermost: rank = ((pp_rank * dp + dp_rank) * cp + cp_rank) * tp + tp_rank. megatron-core
makes the groups as slices of that grid; this file asks for them once, so that nothing else has to.

    ParallelConfig + world size --resolve--> ParallelPlan --init_distributed--> ParallelContext
                                             (pure numbers)                     (the plan, and Ranks: this process)

Example: 8 ranks as tp2 cp2 dp1 pp2. Rank 5 is pp 1, dp 0, cp 0, tp 1; its tp group is 4, 5, its cp group
5, 7, its pp group 1, 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.agreement import Facts, require_equal_facts, require_equal_in_world
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.parallel.plan import resolve as resolve
from megatron_v2pe.parallel.world_name import agree_on_name

RANK_ORDER = "tp-cp-ep-dp-pp"  # experts have axes of their own, etp x ep x their dp, over the same ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """This process's place on each axis, and its groups.

    Attributes:
        rank: rank in the world.
        world_size: ranks of the world.
        tp_rank: place on the tensor parallel axis.
        pp_rank: pipeline stage.
        cp_rank: place on the context parallel axis.
        dp_rank: place on the data parallel axis.
        is_first_stage: this rank holds vision tower, projector and embedding.
        is_last_stage: this rank holds the head and computes the loss.
        device: where this rank's tensors live.
        groups: mcore's collection for the language model: tp, cp, pp, dp, dp_cp, tp_cp, embd and the rest.
        singleton_groups: collection of groups of this rank alone, for parts that are whole on every rank.
        tile_rank: which share of a pack's tiles this rank encodes, 0..plan.tile_ranks-1.
        tile_group: ranks that exchange image features: tp x cp (rank = cp_rank * tp + tp_rank) where tiles are
            shared over tp, else cp alone.
        vision_replica_group: ranks of this stage that hold copies of the vision tower: tp x cp x dp.
    """

    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    is_first_stage: bool
    is_last_stage: bool
    device: torch.device
    groups: ProcessGroupCollection
    singleton_groups: ProcessGroupCollection
    tile_rank: int
    tile_group: dist.ProcessGroup
    vision_replica_group: dist.ProcessGroup


@dataclass(frozen=True, eq=False)
class ParallelContext:
    """The sizes of all parallel axes and this rank's place on them.

    Attributes:
        plan: sizes, the same on every rank.
        ranks: this process.
    """

    plan: ParallelPlan
    ranks: Ranks


@dataclass(frozen=True, kw_only=True)
class Joining:
    """How ranks meet at the start of a run.

    Attributes:
        timeout_s: how long one waits for the others; None waits as long as a collective.
        facts: what must be the same on all ranks, compared before a group is made; None compares nothing.
    """

    timeout_s: float | None = None
    facts: Facts | None = None


def init_distributed(
    plan: ParallelPlan, *, seed: int, timeout_minutes: int = 30, joining: Joining | None = None
) -> ParallelContext:
    """Join the other ranks, make the groups, seed the generators. Collective: every rank must call it.

    One rank needs no launcher; more are found through torchrun's environment. A default process group that
    exists already is used as it is, and so are groups of the same sizes: several engines may follow each other
    in one process. Other sizes need `shutdown` first.

    Args:
        plan: sizes of the axes; their product must be the world size.
        seed: seed of the default generator (equal on all ranks of a stage) and of mcore's tracked ones.
        timeout_minutes: how long a collective may wait for its peers, also while groups are made.
        joining: how ranks meet.

    Raises:
        ConfigError: the plan is for another number of ranks, or ranks were not started alike, or did not meet.
        RuntimeError: this process has joined groups of other sizes.
    """
    device = _local_device()
    joining = joining or Joining()
    if not dist.is_initialized():
        _join_world(device, timeout_minutes, joining)
    elif joining.facts is not None:
        require_equal_in_world(joining.facts)
    if dist.get_world_size() != plan.world_size:
        raise ConfigError(
            f"the plan tp {plan.tp} x pp {plan.pp} x cp {plan.cp} x dp {plan.dp} is for {plan.world_size} "
            f"ranks, but {dist.get_world_size()} were started; start that many"
        )
    if not _has_groups_of(plan):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=plan.tp,
            pipeline_model_parallel_size=plan.pp,
            virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
            context_parallel_size=plan.cp,
            expert_model_parallel_size=plan.ep,
            expert_tensor_parallel_size=plan.etp,
            distributed_timeout_minutes=timeout_minutes,
            order=RANK_ORDER,
            create_gloo_process_groups=False,
        )
    seed_generators(seed)
    return ParallelContext(plan, _ranks(plan, device, timeout_minutes))


def seed_generators(seed: int) -> None:
    """Seed the default generator and mcore's tracked ones; the groups must have been made.

    Stages draw differently, as Megatron has it; tp ranks differ inside mcore's tracked generator only.
    """
    model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())


def _has_groups_of(plan: ParallelPlan) -> bool:
    if not parallel_state.model_parallel_is_initialized():
        return False
    joined = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    if joined != (plan.tp, plan.pp, plan.cp, plan.vpp, plan.ep, plan.etp):
        raise RuntimeError(
            f"this process has joined groups of tp, pp, cp, vpp, ep, etp {joined}; call shutdown before joining {plan}"
        )
    return True


def shutdown() -> None:
    """Wait for the other ranks, then leave. After an error do not call it: the peers may never arrive."""
    if not dist.is_initialized():
        return
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _local_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", launcher().local_rank)
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution; float32 means float32
    return device


def _join_world(device: torch.device, timeout_minutes: int, joining: Joining) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    if launcher().world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    meeting = timeout if joining.timeout_s is None else timedelta(seconds=joining.timeout_s)
    try:
        store, rank, world_size = _met(meeting, joining.facts)
    except (dist.DistError, TimeoutError) as error:
        raise _did_not_meet(error, meeting) from error
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _met(timeout: timedelta, facts: Facts | None) -> tuple[dist.Store, int, int]:
    """The store of this world, in which all ranks have met and have been compared."""
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    name = agree_on_name(store, rank=rank, world_size=world_size, timeout=timeout)
    store = dist.PrefixStore(f"world_{name}", store)
    if facts is not None:
        require_equal_facts(store, facts, rank=rank, world_size=world_size)
    return store, rank, world_size


def _did_not_meet(error: Exception, timeout: timedelta) -> ConfigError:
    """Ranks that did not find each other, or of which one came too late; another start may go well."""
    here = launcher()
    explained = ConfigError(
        f"rank {here.rank} of WORLD_SIZE {here.world_size} did not meet the others at MASTER_ADDR:MASTER_PORT "
        f"{here.master} within {timeout.total_seconds():g} s ({str(error).splitlines()[0]}); start as many ranks as "
        "WORLD_SIZE says, all with the address of rank 0's machine and one free port, and see whether one of them "
        "ended or was stopped; runtime.hang_timeout_s says how long ranks wait"
    )
    explained.is_final = False
    return explained


def _ranks(plan: ParallelPlan, device: torch.device, timeout_minutes: int) -> Ranks:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Made by its one member alone: making a group of each rank with the whole world needs minutes at scale.
    alone = dist.new_group(
        [dist.get_rank()], timeout=timedelta(minutes=timeout_minutes), use_local_synchronization=True
    )
    tile_group = groups.tp_cp if plan.shares_tiles_over_tp else groups.cp
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=groups.tp.rank(),
        pp_rank=groups.pp.rank(),
        cp_rank=groups.cp.rank(),
        dp_rank=groups.dp.rank(),
        is_first_stage=groups.pp.rank() == 0,
        is_last_stage=groups.pp.rank() == plan.pp - 1,
        device=device,
        groups=groups,
        singleton_groups=ProcessGroupCollection(tp=alone, cp=alone, pp=alone, tp_cp=alone),
        tile_rank=tile_group.rank(),
        tile_group=tile_group,
        vision_replica_group=groups.tp_dp_cp,
    )
