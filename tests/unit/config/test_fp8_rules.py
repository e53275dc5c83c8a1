"""`model.fp8` is refused where its products cannot run, by name; what it pads packs to."""

import dataclasses

import pytest

from megatron_v2pe.config.arch.architecture import ExpertsArchitecture, parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.fp8 import check_fp8, pack_multiple
from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.errors import ConfigError

ARCH = parse_architecture(PUBLISHED["2B"])  # 24 layers, 2048 channels, 8192 feed-forward
ONE_B = parse_architecture(PUBLISHED["1B"])  # 14 heads of 64 on 2
EXPERTS = dataclasses.replace(
    ARCH,
    language=dataclasses.replace(
        ARCH.language,
        experts=ExpertsArchitecture(
            num_experts=4,
            top_k=2,
            ffn_size=32,
            is_sparse=(True,) * 24,
            normalizes_top_k=True,
            aux_loss_coefficient=0.0,
        ),
    ),
)


def check(fp8="current", *, arch=ARCH, skip=0, runtime=None, **parallel):
    config = RunConfig(
        model=ModelConfig(fp8=fp8, fp8_skip_layers=skip),
        parallel=ParallelConfig(**parallel),
        runtime=runtime or RuntimeConfig(),
    )
    check_fp8(config, arch)


@pytest.mark.parametrize("fp8", ["current", "blockwise"])
@pytest.mark.parametrize(
    "parallel", [{}, dict(cp=4, cp_comm_type="a2a"), dict(tp=4, sequence_parallel=True, pp=2)]
)
def test_allowed(fp8, parallel):
    check(fp8, **parallel)


def test_small_shares_allow_current_scaling_only():
    check("current", arch=ONE_B, tp=2)
    with pytest.raises(
        ConfigError, match=r"needs multiples of 128, but a rank of parallel\.tp 2 has 448 query"
    ):
        check("blockwise", arch=ONE_B, tp=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(runtime=RuntimeConfig(dtype="float32")), r"runtime\.dtype is 'float32'"),
        (dict(attention_backend="native"), r"parallel\.attention_backend is 'native'"),
        (dict(cp=2, cp_sharding="auto"), r"parallel\.cp_sharding is 'auto'"),
        (dict(arch=EXPERTS), "has experts"),
        (dict(skip=12), r"model\.fp8_skip_layers is 12 at each end of 24 layers"),
        (dict(skip=4, pp=8), "on 8 stages"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=rf"model\.fp8 is 'current', but .*{message}"):
        check(**arguments)
    check("none", **{**arguments, "skip": 0})


def test_layers_are_left_out_of_something():
    with pytest.raises(ConfigError, match=r"model\.fp8_skip_layers is 1, but model\.fp8 is 'none'"):
        ModelConfig(fp8_skip_layers=1)


@pytest.mark.parametrize(
    ("fp8", "parallel", "tokens"),
    [
        ("none", dict(cp=8, tp=2, sequence_parallel=True), 1),
        ("current", {}, 16),
        ("current", dict(cp=8), 128),
        ("current", dict(tp=2), 16),  # every rank has all rows
        ("blockwise", dict(cp=2, tp=4, sequence_parallel=True), 1024),
    ],
)
def test_packs_are_whole_tiles_of_rows_on_every_rank(fp8, parallel, tokens):
    config = RunConfig(model=ModelConfig(fp8=fp8), parallel=ParallelConfig(**parallel))
    assert pack_multiple(config) == tokens
