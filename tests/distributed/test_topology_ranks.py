"""Places on the axes and members of the groups, on real gloo ranks, and that a process can start over."""

import pytest

from tests.support.spawn import RanksFailedError, run_ranks

pytestmark = pytest.mark.distributed


def places(rank, world_size, sizes):
    import torch.distributed as dist

    from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, shutdown

    found = []
    for size in sizes:
        plan = ParallelPlan(**size)
        ranks = init_distributed(plan, seed=0, timeout_minutes=1).ranks
        members = {
            name: dist.get_process_group_ranks(getattr(ranks.groups, name))
            for name in ("tp", "cp", "pp", "dp", "tp_cp", "dp_cp", "tp_dp_cp")
        }
        found.append(
            {
                "place": (ranks.tp_rank, ranks.cp_rank, ranks.dp_rank, ranks.pp_rank),
                "stages": (ranks.is_first_stage, ranks.is_last_stage),
                "tile": (ranks.tile_rank, ranks.tile_group.size()),
                "alone": dist.get_process_group_ranks(ranks.singleton_groups.tp),
                "replicas": dist.get_process_group_ranks(ranks.vision_replica_group),
                **members,
            }
        )
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    shutdown()
    return found


def test_two_ranks_on_each_axis_in_one_process():
    axes = ({"tp": 2, "sequence_parallel": True}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"dp": 2})
    by_rank = run_ranks(places, 2, axes, timeout=90)
    for rank, (tp_sp, tp, cp, pp, dp) in enumerate(by_rank):
        assert tp_sp["place"] == tp["place"] == (rank, 0, 0, 0)
        assert cp["place"] == (0, rank, 0, 0)
        assert dp["place"] == (0, 0, rank, 0)
        assert pp["place"] == (0, 0, 0, rank)
        assert pp["stages"] == (rank == 0, rank == 1)
        assert tp_sp["tile"] == cp["tile"] == (rank, 2)
        assert tp["tile"] == dp["tile"] == pp["tile"] == (0, 1)
        assert tp["alone"] == pp["alone"] == [rank]
        assert tp["replicas"] == cp["replicas"] == dp["replicas"] == [0, 1]
        assert pp["replicas"] == [rank]
        assert (tp["tp"], tp["cp"], cp["dp_cp"], dp["dp_cp"]) == ([0, 1], [rank], [0, 1], [0, 1])


def fail_on_rank_1(rank, world_size):
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("the reason, in full")
    dist.barrier()


def never_return(rank, world_size):
    import time

    time.sleep(60)


def test_helper_shows_the_traceback_of_the_failed_rank_and_stacks_of_a_hang():
    with pytest.raises(RanksFailedError, match="the reason, in full"):
        run_ranks(fail_on_rank_1, 2, timeout=60)
    with pytest.raises(RanksFailedError, match=r"(?s)not finished after 8 s.*most recent call first"):
        run_ranks(never_return, 1, timeout=8)
