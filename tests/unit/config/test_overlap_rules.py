"""Overlap of communication is refused where mcore's counting of gradients would go wrong, and allowed elsewhere."""

import dataclasses

import pytest

from megatron_v2pe.config.arch.architecture import ExpertsArchitecture
from megatron_v2pe.config.overlap import check_overlap
from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig, VisionConfig
from megatron_v2pe.core.errors import ConfigError
from tests.unit.config.test_validate import ARCH

ON = dict(overlap_grad_reduce=True)
EXPERTS = dataclasses.replace(
    ARCH,
    language=dataclasses.replace(
        ARCH.language,
        experts=ExpertsArchitecture(
            num_experts=4,
            top_k=2,
            ffn_size=32,
            is_sparse=(True,) * 6,
            normalizes_top_k=True,
            aux_loss_coefficient=0.0,
        ),
    ),
)


def check(world_size=4, arch=ARCH, parallel=None, **sections):
    check_overlap(RunConfig(parallel=ParallelConfig(**(parallel or ON)), **sections), arch, world_size)


@pytest.mark.parametrize(
    "parallel", [ON, dict(ON, overlap_param_gather=True), dict(ON, cp=4), dict(ON, tp=2, pp=2, cp=2)]
)
def test_allowed(parallel):
    check(8, parallel=parallel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(world_size=1), "the 1 ranks leave one for data and context parallelism"),
        (dict(parallel=dict(ON, tp=4)), "the 4 ranks leave one"),
        (dict(world_size=8, parallel=dict(ON, pp=2, vpp=3)), r"parallel\.vpp is 3"),
        (dict(vision=VisionConfig(micro_batch_tiles=2)), r"vision\.micro_batch_tiles is 2"),
        (dict(model=ModelConfig(recompute="full", mlp_chunks=2)), r"model\.mlp_chunks is 2"),
        (dict(arch=EXPERTS), "has experts"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=rf"parallel\.overlap_grad_reduce is true, but .*{message}"):
        check(**arguments)
    off = {**(arguments.get("parallel") or {}), "overlap_grad_reduce": False}
    check(**{**arguments, "parallel": off})


def test_gathering_needs_the_buckets_of_the_reduction():
    with pytest.raises(
        ConfigError, match=r"overlap_param_gather is true, but parallel\.overlap_grad_reduce is false"
    ):
        ParallelConfig(overlap_param_gather=True)
