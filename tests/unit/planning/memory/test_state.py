"""Parameters, gradients and optimizer bytes: predicted by formula, compared with ranks built on the meta device."""

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import (
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.parallel.plan import ParallelPlan, resolve
from megatron_v2pe.planning.memory.parameters import model_chunk_parameters
from megatron_v2pe.planning.memory.state import fill_buckets, rank_state, shard_numbers
from megatron_v2pe.planning.planner_check import compare_rank
from megatron_v2pe.planning.request.stages import (
    ModelChunk,
    forwards_in_flight,
    model_chunks_of_rank,
)

BF16 = RuntimeConfig(dtype="bfloat16")


def run(**sections):
    return RunConfig(**{"runtime": BF16, **sections})


def arch(size):
    return parse_architecture(PUBLISHED[size])


LAYOUTS = {
    "2B, one rank": ("2B", 1, [0], run()),
    "2B, dp 4": ("2B", 4, [0, 1, 3], run()),
    "2B float32, tp 2 with sequence parallelism": (
        "2B",
        8,
        [0, 7],
        run(
            parallel=ParallelConfig(tp=2, sequence_parallel=True),
            runtime=RuntimeConfig(dtype="float32"),
        ),
    ),
    "1B, embedding tied over two stages": ("1B", 8, [0, 5, 7], run(parallel=ParallelConfig(pp=2, cp=2))),
    "8B, virtual stages": (
        "8B",
        16,
        [0, 15],
        run(parallel=ParallelConfig(tp=2, pp=2, cp=2, vpp=2, sequence_parallel=True)),
    ),
    "8B, explicit stages": (
        "8B",
        2,
        [0, 1],
        run(parallel=ParallelConfig(pp=2, pipeline_layout="Et*14|t*18L")),
    ),
    "26B, tower split": (
        "26B",
        32,
        [0, 31],
        run(parallel=ParallelConfig(tp=4, cp=8, vision="tensor", sequence_parallel=True)),
    ),
    "26B, tower frozen": (
        "26B",
        32,
        [3],
        run(parallel=ParallelConfig(tp=4, cp=8), vision=VisionConfig(freeze=True)),
    ),
    "4B, language frozen": (
        "4B",
        2,
        [0],
        run(parallel=ParallelConfig(tp=2), model=ModelConfig(freeze_language=True)),
    ),
    "1B, adapters everywhere": (
        "1B",
        4,
        [0, 3],
        run(
            parallel=ParallelConfig(tp=2, sequence_parallel=True),
            lora=LoRAConfig(language_rank=8, vision_rank=8, projector_rank=4),
        ),
    ),
    "3.5-8B, norms of queries and keys": (
        "3.5-8B",
        8,
        [0, 7],
        run(parallel=ParallelConfig(tp=2, pp=2, sequence_parallel=True)),
    ),
    "3.5-30B-A3B, experts over 8 ranks": (
        "3.5-30B-A3B",
        16,
        [0, 5, 15],
        run(parallel=ParallelConfig(tp=2, cp=2, pp=2, ep=8, sequence_parallel=True)),
    ),
    "3.5-30B-A3B, experts split": (
        "3.5-30B-A3B",
        16,
        [3],
        run(parallel=ParallelConfig(tp=2, ep=4, etp=2, sequence_parallel=True)),
    ),
    "3.5-20B-A4B, experts over 4 ranks": (
        "3.5-20B-A4B",
        8,
        [0, 5],
        run(parallel=ParallelConfig(tp=2, pp=2, ep=4, sequence_parallel=True)),
    ),
    "3.5-20B-A4B, experts split": (
        "3.5-20B-A4B",
        8,
        [3],
        run(parallel=ParallelConfig(tp=4, cp=2, ep=2, etp=4, sequence_parallel=True)),
    ),
    "8B, adapters of two linears": (
        "8B",
        8,
        [0, 7],
        run(parallel=ParallelConfig(tp=2, pp=2), lora=LoRAConfig(language_rank=8, targets=("wqkv", "w1"))),
    ),
    "76B on 256 ranks": (
        "76B",
        256,
        [0, 100, 255],
        run(parallel=ParallelConfig(tp=8, pp=4, cp=8, sequence_parallel=True)),
    ),
    "76B on 512 ranks, tower split": (
        "76B",
        512,
        [0, 511],
        run(parallel=ParallelConfig(tp=8, pp=4, cp=8, vision="tensor", sequence_parallel=True)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_is_predicted_to_the_byte(name):
    size, world_size, ranks, config = LAYOUTS[name]
    plan = resolve(config.parallel, world_size)
    for rank in ranks:
        found = compare_rank(config, arch(size), plan=plan, rank=rank)
        assert found.same_parameters, f"rank {rank}"
        assert found.predicted == found.built, f"rank {rank}"


def test_all_stages_together_hold_the_whole_model():
    # 2,205,754,368 numbers, and 55 padding rows in embedding and head.
    plan = ParallelPlan(pp=4)
    parallel = ParallelConfig(pp=4)
    total = sum(
        size
        for pp_rank in range(4)
        for model_chunk in model_chunks_of_rank(parallel, 24, plan, pp_rank)
        for _, size in model_chunk_parameters(arch("2B"), plan, model_chunk)
    )
    assert total == 2_205_754_368 + 2 * (92_608 - 92_553) * 2048


def test_shards_of_all_ranks_make_up_the_parameters():
    buckets = fill_buckets([1000, 77, 130, 5], sharing_ranks=3)
    assert [bucket.length for bucket in buckets] == [1536]  # a multiple of lcm(3, 128)
    assert sum(shard_numbers(buckets, sharing_ranks=3, sharing_rank=rank) for rank in range(3)) == 1212


def test_optimizer_state_differs_by_rank_where_gaps_do():
    config = run(parallel=ParallelConfig(cp=4))
    plan = resolve(config.parallel, 4)
    states = [rank_state(config, arch("2B"), plan, rank) for rank in range(4)]
    assert len({state.gradients_bytes for state in states}) == 1
    assert sum(state.optimizer_bytes for state in states) == 12 * (2_205_754_368 + 2 * 55 * 2048)


def test_micro_batches_in_flight():
    assert [forwards_in_flight(ParallelPlan(pp=4), rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [forwards_in_flight(ParallelPlan(pp=4), rank, 2) for rank in range(4)] == [2, 2, 2, 1]
    assert forwards_in_flight(ParallelPlan(pp=4, vpp=2), 0, 8) == 11


def test_stages_of_a_layout():
    parallel = ParallelConfig(pp=2, vpp=2, pipeline_layout="E|t*2|t|t*3L")
    model_chunks = [model_chunks_of_rank(parallel, 6, ParallelPlan(pp=2, vpp=2), rank) for rank in range(2)]
    assert model_chunks[0] == (
        ModelChunk(num_layers=0, is_first=True, is_last=False),
        ModelChunk(num_layers=1, is_first=False, is_last=False, first_layer=2),
    )
    assert model_chunks[1][1] == ModelChunk(num_layers=3, is_first=False, is_last=True, first_layer=3)
