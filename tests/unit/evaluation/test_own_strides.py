"""Evaluations answer with the checkpoint's own stride unless others are named, as `generate` does."""

import dataclasses
import logging

import pytest

from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.evaluation.jobs.engine_adapter import own_strides
from tests.support.prompts import FAMILY, GOLDEN

ARCH = read_architecture(GOLDEN / FAMILY)  # 16 visual tokens per tile


def trained(mode, stride=0):
    return dataclasses.replace(ARCH, position_mode=mode, position_stride=stride)


@pytest.mark.parametrize(
    ("arch", "asked", "wanted"),
    [
        (trained("v2pe_fixed", 4), "", [("v2pe_fixed", 4)]),
        (trained("v2pe_random", 8), "", [("v2pe_fixed", 8)]),
        (trained("default"), "", [("default", 16)]),
        (trained("v2pe_fixed", 4), "default,1", [("default", 16), ("v2pe_fixed", 1)]),
    ],
)
def test_own_or_named(arch, asked, wanted, caplog):
    with caplog.at_level(logging.INFO):
        found = own_strides(arch, asked)
    assert [(setting.mode, setting.stride) for setting in found] == wanted
    assert ("stride" in caplog.text) is (asked == "")  # which one is used is said


def test_random_strides_without_a_recommended_one_are_refused():
    with pytest.raises(ConfigError, match=r"recommends none; name one with --strides 1\.\.16"):
        own_strides(trained("v2pe_random"), "")
