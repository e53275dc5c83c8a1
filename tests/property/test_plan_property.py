"""Plans of any mixture: nothing lost or repeated, budgets kept, ranks and restarts change nothing."""

import itertools
import math
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.config.batch_schedule import constant_batches, ramped_batches
from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.data.plan.balance import assign_packs, imbalance, order_for_steps, whole_steps
from megatron_v2pe.data.plan.epoch_plan import MixturePlan
from megatron_v2pe.data.samples.cost import PackCost
from tests.unit.data.plan.test_epoch_plan import index

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 10)), min_size=1, max_size=50)
REPEATS = st.sampled_from([0.333, 0.5, 1.0, 1.25, 2.0, 3.7])
COST = PackCost(square=0.01, tile=3.0)


@st.composite
def schedules(draw):
    """Steps of one size, or a ramp-up; every size is a multiple of the same number."""
    each = draw(st.sampled_from([1, 2, 4, 6]))
    if draw(st.booleans()):
        return constant_batches(each)
    start, increment, parts = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    return ramped_batches(
        start=each * start,
        increment=each * increment,
        packs=draw(st.integers(1, 60)),
        size=each * (start + increment * parts),
    )


@st.composite
def mixtures(draw):
    """(indexes, settings of the plan), with at least one sample to draw."""
    indexes = []
    for number in range(draw(st.integers(1, 3))):
        samples = draw(SAMPLES)
        repeat = 1.0 if number == 0 else draw(REPEATS)
        tokens, tiles = [sample[0] for sample in samples], [sample[1] for sample in samples]
        indexes.append(index(tokens, name=f"set{number}", repeat=repeat, num_tiles=tiles))
    return indexes, {
        "packing": draw(st.sampled_from(["best_fit", "release_greedy"])),
        "balance": draw(st.booleans()),
        "shuffle": draw(st.booleans()),
        "batches": draw(schedules()),
        "max_pack_tokens": draw(st.sampled_from([100, 250, 1000])),
    }


def plan(indexes, *, batches, **data):
    values = {"max_sample_tokens": 100, "max_pack_tiles": 60, **data}
    return MixturePlan(indexes, data=DataConfig(**values), seed=3, batches=batches, cost=COST)


def epoch_of(packs, epoch):
    return Counter(
        (sample.dataset, sample.row) for pack in packs if pack.epoch == epoch for sample in pack.samples
    )


@given(mixture=mixtures())
@settings(max_examples=60, deadline=None)
def test_no_sample_is_lost_or_drawn_beyond_its_repeat(mixture):
    indexes, values = mixture
    planned = plan(indexes, **values)
    batches, packs = values["batches"], []
    for step in itertools.count():
        assert len(packs) == batches.packs_before(step)
        if len(packs) >= planned._end(0, 1):
            break
        packs += planned.packs_of_step(step)
    for epoch in (0, 1):
        drawn = epoch_of(packs, epoch)
        for dataset, each in enumerate(indexes):
            whole = int(each.entry.repeat_time)
            counts = [drawn.get((dataset, row), 0) for row in range(len(each))]
            assert set(counts) <= {whole, whole + 1}
            assert sum(counts) == len(each) * whole + round(len(each) * (each.entry.repeat_time - whole))


@given(mixture=mixtures())
@settings(max_examples=60, deadline=None)
def test_packs_keep_their_budgets_and_costs(mixture):
    indexes, values = mixture
    planned = plan(indexes, **values)
    for step in range(6):
        for pack in planned.packs_of_step(step):
            tokens = np.array([indexes[s.dataset].num_tokens[s.row] for s in pack.samples])
            tiles = np.array([indexes[s.dataset].num_tiles[s.row] for s in pack.samples])
            assert len(pack.samples) > 0
            assert tokens.sum() <= values["max_pack_tokens"]
            assert tiles.sum() <= 60
            assert np.isclose(pack.cost, COST.of_samples(tokens, tiles).sum())


@given(mixture=mixtures(), start=st.integers(0, 8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_resumed_run_goes_on_at_any_number_of_ranks(mixture, start, data):
    """Steps from a fresh plan, assigned to other ranks, are those that the first plan would have come to."""
    indexes, values = mixture
    batches = values["batches"]
    sizes = [size for size in (1, 2, 3, 4, 6) if math.gcd(*batches.sizes) % size == 0]
    before, after = data.draw(st.sampled_from(sizes)), data.draw(st.sampled_from(sizes))
    first, second = plan(indexes, **values), plan(indexes, **values)
    assert first.fingerprint == second.fingerprint
    for step in range(start):
        for rank in range(before):
            first.packs_of_rank(step, dp_rank=rank, dp=before)
    for step in range(start, start + 3):
        continued = first.packs_of_step(step)
        assigned = [second.packs_of_rank(step, dp_rank=rank, dp=after) for rank in range(after)]
        assert {len(packs) for packs in assigned} == {batches.size(step) // after}
        assert sorted(map(repr, continued)) == sorted(repr(pack) for packs in assigned for pack in packs)


COSTS = st.lists(st.floats(1, 1000), min_size=1, max_size=60)


@given(batches=schedules(), first=st.integers(0, 150), count=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_whole_steps_are_those_that_begin_and_end_within(batches, first, count):
    """Against every step computed on its own."""
    head, sizes = whole_steps(batches, first, count)
    spans = [(batches.packs_before(step), batches.packs_before(step + 1)) for step in range(300)]
    within = [(low, high) for low, high in spans if first <= low and high <= first + count]
    assert sizes.tolist() == [high - low for low, high in within]
    if within:
        assert first + head == within[0][0]
    assert first + head in [low for low, _ in spans] or head == count


@given(costs=COSTS, batches=schedules(), first=st.integers(0, 90), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_an_order_for_steps_holds_every_pack_once(costs, batches, first, seed):
    head, sizes = whole_steps(batches, first, len(costs))
    order = order_for_steps(costs, head=head, sizes=sizes, generator=np.random.default_rng(seed))
    assert sorted(order.tolist()) == list(range(len(costs)))


@given(each=st.integers(1, 5), ranks=st.integers(1, 6), data=st.data())
@settings(max_examples=200, deadline=None)
def test_packs_are_assigned_once_in_equal_numbers(each, ranks, data):
    costs = data.draw(st.lists(st.floats(1, 1000), min_size=each * ranks, max_size=each * ranks))
    assigned = assign_packs(costs, ranks)
    assert [len(places) for places in assigned] == [each] * ranks
    assert sorted(place for places in assigned for place in places) == list(range(each * ranks))


def test_assignment_evens_out_what_a_step_holds():
    costs = np.random.default_rng(0).lognormal(0, 0.5, 64).tolist()
    in_turn = [list(range(rank, 64, 8)) for rank in range(8)]
    assert imbalance(costs, assign_packs(costs, 8)) < 1.03 < imbalance(costs, in_turn)


def test_steps_hold_packs_of_about_equal_cost():
    costs = np.random.default_rng(0).lognormal(0, 0.5, 6400)
    order = order_for_steps(costs, head=17, sizes=np.full(99, 64), generator=np.random.default_rng(1))
    groups = costs[order][17 : 17 + 64 * 99].reshape(-1, 64)
    ratios = groups.max(axis=1) / groups.mean(axis=1)
    assert np.median(ratios) < 1.03
    assert abs(np.corrcoef(np.arange(99), groups.mean(axis=1))[0, 1]) < 0.3  # steps come in no order of cost


def test_steps_of_a_ramp_up_hold_packs_of_about_equal_cost():
    """Small and large steps alike, and neither gets the cheap ones."""
    costs = np.random.default_rng(0).lognormal(0, 0.5, 6400)
    batches = ramped_batches(start=16, increment=16, packs=3200, size=64)
    head, sizes = whole_steps(batches, 0, 6400)
    assert (head, set(sizes.tolist())) == (0, {16, 32, 48, 64})
    ordered = costs[order_for_steps(costs, head=0, sizes=sizes, generator=np.random.default_rng(1))]
    steps = np.split(ordered, np.cumsum(sizes))[:-1]
    assert np.median([step.max() / step.mean() for step in steps]) < 1.03
    small = np.mean([step.mean() for step in steps if len(step) == 16])
    assert abs(small / costs.mean() - 1) < 0.15
