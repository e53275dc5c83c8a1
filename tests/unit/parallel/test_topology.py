"""Plans are numbers: what divides, what is refused, and what follows for padding and tiles."""

import pytest
import torch
import torch.distributed as dist

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.topology import ParallelPlan, init_distributed, resolve, shutdown


@pytest.mark.parametrize(
    ("sizes", "world_size", "dp"),
    [((1, 1, 1), 1, 1), ((2, 1, 2), 4, 1), ((2, 2, 2), 16, 2), ((1, 3, 1), 6, 2)],
)
def test_the_rest_of_the_world_is_data_parallel(sizes, world_size, dp):
    tp, pp, cp = sizes
    plan = resolve(ParallelConfig(tp=tp, pp=pp, cp=cp), world_size)
    assert (plan.tp, plan.pp, plan.cp, plan.dp) == (tp, pp, cp, dp)
    assert plan.world_size == world_size


@pytest.mark.parametrize("world_size", [6, 4, 12])
def test_a_world_that_is_no_multiple_of_the_model_is_refused(world_size):
    with pytest.raises(ConfigError) as error:
        resolve(ParallelConfig(tp=2, pp=2, cp=2), world_size)
    message = str(error.value)
    assert message.startswith("parallel.tp * parallel.pp * parallel.cp = 2 * 2 * 2 = 8 must divide")
    assert f"the world size {world_size};" in message


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "pad", "tile_ranks"),
    [(1, 1, False, 1, 1), (2, 1, False, 1, 1), (2, 1, True, 2, 2), (2, 4, False, 8, 4), (2, 4, True, 16, 8)],
)
def test_padding_and_tile_shares_follow_from_the_plan(tp, cp, sequence_parallel, pad, tile_ranks):
    plan = ParallelPlan(tp=tp, cp=cp, sequence_parallel=sequence_parallel)
    assert plan.pad_to_multiple == pad
    assert plan.tile_ranks == tile_ranks


def test_one_rank_needs_no_launcher_and_can_start_again():
    drawn = []
    for seed in (1, 1, 2):
        ranks = init_distributed(ParallelPlan(), seed=seed, timeout_minutes=1).ranks
        assert (ranks.rank, ranks.tp_rank, ranks.pp_rank, ranks.cp_rank, ranks.dp_rank) == (0, 0, 0, 0, 0)
        assert ranks.is_first_stage
        assert ranks.is_last_stage
        assert ranks.groups.tp.size() == ranks.groups.dp_cp.size() == 1
        assert ranks.singleton_groups.cp.size() == 1
        assert ranks.device == torch.device("cpu")
        drawn.append(torch.rand(1).item())
        shutdown()
        assert not dist.is_initialized()
    shutdown()  # nothing to leave: no error
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_plan_for_another_world_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="is for 2 ranks, but 1 were started"):
            init_distributed(ParallelPlan(tp=2), seed=0)
    finally:
        dist.destroy_process_group()
