"""Packs of a step: in packs, in tokens, ramped up as Megatron does it; refused where ranks cannot share them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import num_microbatches_calculator

from megatron_v2pe.config.batch_schedule import batch_schedule, check_batches, ramped_batches
from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.config.schema import DataConfig, OptimConfig, ParallelConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError


def run(**optim):
    return RunConfig(
        optim=OptimConfig(**optim), data=DataConfig(max_pack_tokens=1000, max_sample_tokens=1000)
    )


def test_nothing_said_is_one_pack():
    batches = batch_schedule(run())
    assert (batches.full_size, batches.sizes, batches.packs_before(7)) == (1, (1,), 7)


def test_packs_and_tokens_are_two_ways_to_say_the_same():
    assert batch_schedule(run(global_batch_tokens=32000)) == batch_schedule(run(global_batch_size=32))


def test_tokens_are_whole_packs():
    with pytest.raises(
        ConfigError, match=r"global_batch_tokens is 2500, .* 1000 must divide.* 2000 or 3000$"
    ):
        batch_schedule(run(global_batch_tokens=2500))
    with pytest.raises(ConfigError, match=r"nearest: 1000$"):
        batch_schedule(run(global_batch_tokens=10))


def test_a_step_is_counted_in_one_way():
    with pytest.raises(
        ConfigError, match=r"global_batch_size is 2 and optim.global_batch_tokens is 2000, but"
    ):
        OptimConfig(global_batch_size=2, global_batch_tokens=2000)


def test_levels_of_a_ramp_up():
    """[2, 2, 12] to 6: parts of 6 packs, so 3 steps of 2, then 2 of 4, which go two packs too far, then 6."""
    batches = batch_schedule(run(global_batch_size=6, batch_rampup=(2, 2, 12)))
    assert [batches.size(step) for step in range(7)] == [2, 2, 2, 4, 4, 6, 6]
    assert [batches.packs_before(step) for step in range(7)] == [0, 2, 4, 6, 10, 14, 20]
    assert batches.text == "2 packs, 4 from step 4, 6 from step 6"


def test_a_part_that_a_larger_step_jumps_over_has_no_steps():
    batches = ramped_batches(start=10, increment=10, packs=15, size=40)  # parts of 5 packs
    assert [batches.size(step) for step in range(4)] == [10, 30, 40, 40]


RAMP = getattr(num_microbatches_calculator, "RampupBatchsizeNumMicroBatchesCalculator", None)


@pytest.mark.skipif(RAMP is None, reason="megatron-core 0.19 has no linear ramp any more; 0.16 judges ours")
@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(1, 20),
    increment=st.integers(1, 9),
    parts=st.integers(1, 12),
    each=st.integers(1, 200),
)
def test_sizes_are_those_of_megatron(start, increment, parts, each):
    size, packs = start + parts * increment, parts * each
    calculator = RAMP(size, 1, 1, False, 1, start, increment, packs)
    batches, used = ramped_batches(start=start, increment=increment, packs=packs, size=size), 0
    for step in range(len(batches.levels) * 3 + packs // start):
        calculator.update(used, consistency_check=False)
        assert (batches.size(step), batches.packs_before(step)) == (calculator.get(), used)
        used += batches.size(step)
    assert batches.size(step) == size


@settings(max_examples=100, deadline=None)
@given(
    start=st.integers(1, 9), increment=st.integers(1, 9), parts=st.integers(1, 9), packs=st.integers(1, 500)
)
def test_sizes_rise_to_the_full_one_behind_the_packs(start, increment, parts, packs):
    """Also where the packs are no multiple of the parts."""
    batches = ramped_batches(start=start, increment=increment, packs=packs, size=start + parts * increment)
    steps = range(packs // start + 2)
    sizes = [batches.size(step) for step in steps]
    assert sizes == sorted(sizes)
    assert sizes[0] == start
    assert [batches.packs_before(step) for step in steps] == [sum(sizes[:step]) for step in steps]
    assert all(
        (size == batches.full_size) == (batches.packs_before(step) >= packs)
        for step, size in enumerate(sizes)
    )


@pytest.mark.parametrize(
    ("rampup", "words"),
    [
        ((8, 2, 10), r"batch_rampup is \[8, 2, 10\], which starts at 8 packs, but a step has 8 in the end"),
        ((1, 2, 10), r"adds 2 at a time, but the step of 8 is 7 away.*divisor: 1, 7"),
    ],
)
def test_ramp_ups_that_do_not_end_at_the_full_step(rampup, words):
    with pytest.raises(ConfigError, match=words):
        batch_schedule(run(global_batch_size=8, batch_rampup=rampup))


@pytest.mark.parametrize("text", ["[1,2]", "[0,1,5]", "[1,1,-5]", "[1,1,2.5]", "[1,a,3]", "4"])
def test_a_ramp_up_is_three_positive_numbers(text):
    with pytest.raises(ConfigError, match=r"optim\.batch_rampup( is |: Invalid| holds )"):
        load_run_config(None, [f"optim.batch_rampup={text}"])


def test_ranks_share_every_step():
    check_batches(run(global_batch_size=8, batch_rampup=(4, 2, 10)), dp=2)
    with pytest.raises(ConfigError, match=r"from step 4 on a step has 6 packs, but the 4 .* multiples of 4$"):
        check_batches(run(global_batch_size=8, batch_rampup=(4, 2, 22)), dp=4)
    with pytest.raises(
        ConfigError, match=r"global_batch_tokens is 6000, 6 packs of .* nearest: 4000 or 8000$"
    ):
        check_batches(run(global_batch_tokens=6000), dp=4)


def test_the_interleaved_schedule_needs_multiples_of_pp_in_every_step():
    parallel = ParallelConfig(pp=2, vpp=2)
    check_batches(
        dataclasses.replace(run(global_batch_size=8, batch_rampup=(4, 4, 9)), parallel=parallel), dp=2
    )
    with pytest.raises(
        ConfigError, match=r"rank 1 micro batches.*multiple of parallel.pp = 2.*multiples of 4$"
    ):
        check_batches(
            dataclasses.replace(run(global_batch_size=8, batch_rampup=(2, 2, 9)), parallel=parallel),
            dp=2,
        )
