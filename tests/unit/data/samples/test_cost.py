"""The cost of a pack is the model's operations, in units of a token's linears."""

import numpy as np
import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.flops import PackCounts, decoder_linear_parameters, step_flops
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.data.samples.cost import pack_cost

LENGTHS = (30000, 1000, 7)


@pytest.mark.parametrize("size", ["1B", "2B", "26B"])
def test_costs_are_the_operations_of_the_step_without_the_head(size):
    arch = parse_architecture(PUBLISHED[size])
    cost = pack_cost(arch, trains_vision=True)
    pack = PackCounts(document_lengths=LENGTHS, supervised_tokens=0, num_tiles=90)
    ours = cost.of_samples(np.array(LENGTHS), np.array([90, 0, 0])).sum()
    assert ours * 6 * decoder_linear_parameters(arch) == pytest.approx(step_flops(arch, [pack]), rel=1e-12)


def test_a_frozen_tower_costs_its_forward_pass():
    arch = parse_architecture(PUBLISHED["2B"])
    trained, frozen = (pack_cost(arch, trains_vision=trains) for trains in (True, False))
    assert frozen.square == trained.square == pytest.approx(1 / 30720, rel=1e-3)
    assert trained.tile / 3 < frozen.tile < 0.4 * trained.tile
