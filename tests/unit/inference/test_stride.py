"""The stride is the checkpoint's; naming another is a choice that is said."""

import dataclasses

import pytest

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.prompts.stride import choose_stride
from tests.support.prompts import FAMILY, GOLDEN

ARCH = read_architecture(GOLDEN / FAMILY)  # 16 visual tokens per tile


def trained(mode, stride=0):
    return dataclasses.replace(ARCH, position_mode=mode, position_stride=stride)


@pytest.mark.parametrize(
    ("arch", "asked", "wanted", "reason"),
    [
        (trained("v2pe_fixed", 4), None, (4, "v2pe_fixed"), "was trained with"),
        (trained("v2pe_fixed", 4), 2, (2, "v2pe_fixed"), "was trained with stride 4"),
        (trained("v2pe_random", 8), None, (8, "v2pe_fixed"), "recommends"),
        (trained("v2pe_random"), 1, (1, "v2pe_fixed"), "named by --stride"),
        (trained("default"), None, (16, "default"), "whole positions"),
        (trained("default"), 4, (4, "v2pe_fixed"), "without V2PE"),
        (trained("default"), 16, (16, "v2pe_fixed"), "without V2PE"),
    ],
)
def test_which_stride_is_used_and_why(arch, asked, wanted, reason):
    found = choose_stride(arch, asked)
    assert (found.stride, found.mode) == wanted
    assert f"stride {wanted[0]} of 16" in found.reason
    assert reason in found.reason


def test_one_stride_that_config_json_does_not_name():
    with pytest.raises(ConfigError, match=r"trained with one stride .* but not with which"):
        choose_stride(trained("v2pe_fixed"), None)


@pytest.mark.parametrize("asked", [0, 17, -1])
def test_out_of_range(asked):
    with pytest.raises(ConfigError, match=rf"--stride is {asked}, but must lie in 1\.\.16"):
        choose_stride(ARCH, asked)


def test_random_strides_need_one():
    with pytest.raises(ConfigError, match=r"recommends none; name one with --stride"):
        choose_stride(trained("v2pe_random"), None)
