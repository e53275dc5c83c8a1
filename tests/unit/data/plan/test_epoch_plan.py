"""Plans: exact repeats, nothing lost, budgets, curriculum, tolerance for bad samples. No files are needed."""

from collections import Counter

import numpy as np
import pytest

from megatron_v2pe.config.batch_schedule import constant_batches, ramped_batches
from megatron_v2pe.config.schema import CurriculumStage, DataConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import DatasetIndex
from megatron_v2pe.data.index.rows import BadSample
from megatron_v2pe.data.plan.epoch_plan import MixturePlan, TooManyBadError
from tests.support.mixture import entry


def index(num_tokens, *, name="a", repeat=1.0, num_tiles=None, bad=0):
    count = len(num_tokens)
    tiles = np.zeros(count, dtype=np.int64) if num_tiles is None else np.array(num_tiles)
    return DatasetIndex(
        entry=entry(name=name, annotation=f"{name}.jsonl", repeat_time=repeat),
        content=name,
        settings={"tokenizer": "t"},
        units=np.zeros((count, 2), dtype=np.int32),
        num_cut=0,
        offsets=np.arange(count),
        line_numbers=np.arange(1, count + 1),
        num_tokens=np.array(num_tokens, dtype=np.int64),
        num_supervised=np.ones(count, dtype=np.int64),
        num_tiles=tiles,
        first_image=np.zeros(count + 1, dtype=np.int64),
        first_medium=np.zeros(count + 1, dtype=np.int64),
        media_images=np.zeros(0, dtype=np.int32),
        sizes=np.zeros((0, 2), dtype=np.int64),
        bad=tuple(
            BadSample(
                sample_id=f"{name}:{count + 1 + number}",
                line_number=count + 1 + number,
                message=f"{name}.jsonl:{count + 1 + number}: broken",
            )
            for number in range(bad)
        ),
    )


def plan(*indexes, batch=2, batches=None, seed=1, **data):
    values = {"max_pack_tokens": 100, "max_sample_tokens": 100, "max_pack_tiles": 10, **data}
    return MixturePlan(
        indexes, data=DataConfig(**values), seed=seed, batches=batches or constant_batches(batch)
    )


def epoch_draws(planned, *, stage=0, epoch=0):
    """(data set, row) -> times drawn in one epoch."""
    rows = planned.epoch(stage, epoch).rows
    samples = [planned._planned_sample(int(row), 0) for row in rows]
    return Counter((sample.dataset, sample.row) for sample in samples)


LENGTHS = np.random.default_rng(0).integers(5, 95, 200).tolist()


def test_repeats_are_exact_in_every_epoch_and_fractions_are_drawn_anew():
    planned = plan(index(LENGTHS, repeat=0.333), index(LENGTHS, name="b", repeat=2.5))
    parts = []
    for epoch in range(3):
        draws = epoch_draws(planned, epoch=epoch)
        of_a = {row for (dataset, row) in draws if dataset == 0}
        of_b = [count for (dataset, _), count in draws.items() if dataset == 1]
        assert len(of_a) == round(0.333 * 200)
        assert sorted(of_b) == [2] * 100 + [3] * 100
        parts.append(of_a)
    assert parts[0] != parts[1] != parts[2]


def test_occurrences_tell_repeats_of_an_epoch_apart():
    epoch = plan(index([10, 20], repeat=3.0)).epoch(0, 0)
    drawn = sorted(zip(epoch.rows.tolist(), epoch.occurrences.tolist(), strict=True))
    assert drawn == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_packs_keep_both_budgets():
    tiles = np.random.default_rng(1).integers(0, 6, 200).tolist()
    epoch = plan(index(LENGTHS, num_tiles=tiles)).epoch(0, 0)
    for low, high in zip(epoch.bounds[:-1], epoch.bounds[1:], strict=True):
        rows = epoch.rows[low:high]
        assert sum(LENGTHS[row] for row in rows) <= 100
        assert sum(tiles[row] for row in rows) <= 10


def test_steps_run_through_the_epochs_without_dropping_a_pack():
    planned = plan(index(LENGTHS), batch=3)
    packs = [pack for step in range(120) for pack in planned.packs_of_step(step)]
    first = [pack for pack in packs if pack.epoch == 0]
    second = [pack for pack in packs if pack.epoch == 1]
    for group in (first, second):
        assert sorted(sample.row for pack in group for sample in pack.samples) == list(range(200))
    assert packs[: len(first)] == first
    assert first != second


def test_a_step_is_the_same_whether_or_not_earlier_steps_were_asked_for():
    data = (index(LENGTHS, repeat=1.5),)
    straight = [plan(*data).packs_of_step(step) for step in range(60)]
    one = plan(*data)
    assert one.packs_of_step(59) == straight[59]
    assert one.packs_of_step(3) == straight[3]


def test_seed_changes_the_order_and_shuffle_false_keeps_the_files():
    data = (index(LENGTHS),)
    assert plan(*data).packs_of_step(0) != plan(*data, seed=2).packs_of_step(0)
    ordered = plan(*data, shuffle=False)
    firsts = [pack.samples[0].row for step in range(10) for pack in ordered.packs_of_step(step)]
    assert firsts == sorted(firsts)
    assert ordered.packs_of_step(0)[0].samples[0].row == 0


def test_curriculum_draws_short_samples_first():
    stages = (CurriculumStage(max_sample_tokens=30), CurriculumStage(from_step=4))
    planned = plan(index(LENGTHS), curriculum=stages)

    def longest(step):
        return max(LENGTHS[sample.row] for pack in planned.packs_of_step(step) for sample in pack.samples)

    assert max(longest(step) for step in range(4)) <= 30
    assert max(longest(step) for step in range(4, 30)) > 30
    assert planned.packs_of_step(3)[0].epoch != planned.packs_of_step(4)[0].epoch


def test_a_stage_without_samples_is_refused():
    planned = plan(index([50, 60]), curriculum=(CurriculumStage(max_sample_tokens=10),))
    with pytest.raises(DataError, match="no sample of at most 10 tokens is left"):
        planned.packs_of_step(0)


def test_samples_longer_than_a_pack_are_bad_and_never_drawn():
    data = index([*LENGTHS, 101], num_tiles=[0] * 200 + [1])
    with pytest.raises(DataError, match=r"a\.jsonl:201: 101 tokens and 1 tiles do not fit a pack"):
        plan(data, max_sample_tokens=200)
    planned = plan(data, max_sample_tokens=200, max_bad_samples=0.01)
    assert (planned.num_bad, planned.num_samples) == (1, 200)
    assert (0, 200) not in epoch_draws(planned)
    with pytest.raises(DataError, match="5 tokens and 11 tiles do not fit"):
        plan(index([5], num_tiles=[11]))


def test_share_of_bad_samples():
    assert plan(index(LENGTHS, bad=2), max_bad_samples=0.01).num_bad == 2
    with pytest.raises(DataError, match=r"3 of 203 samples are bad, but .* = 0.01 allows 2") as caught:
        plan(index(LENGTHS, bad=3), max_bad_samples=0.01)
    for line in (201, 202, 203):
        assert f"a.jsonl:{line}" in str(caught.value)
    assert str(caught.value).count("broken") == 1


def test_where_all_are_bad_the_causes_are_listed_whatever_share_may_be():
    with pytest.raises(TooManyBadError, match=r"all 3 samples are bad, and none is left") as caught:
        plan(index([], bad=3), max_bad_samples=1.0)
    assert "a.jsonl:1: broken" in str(caught.value)
    assert "and 2 more of this kind: a.jsonl:2, a.jsonl:3" in str(caught.value)


def test_long_lists_of_bad_samples_are_cut():
    with pytest.raises(DataError, match=r"and 29 more of this kind: a.jsonl:202, .*, \.\.\."):
        plan(index(LENGTHS, bad=30))


def test_no_sample_at_all():
    with pytest.raises(DataError, match="hold no sample at all"):
        plan(index([]))


def test_runs_from_before_ramp_ups_go_on():
    """Fingerprint and order of a plan with steps of one size, as they were recorded before sizes could change."""
    planned = plan(index(LENGTHS), batch=3)
    rows = [sample.row for step in (0, 40) for pack in planned.packs_of_step(step) for sample in pack.samples]
    assert planned.fingerprint == "17a5852716d630c8"
    assert rows == [182, 45, 131, 15, 20, 102, 22, 39, 120]


def test_a_changed_ramp_up_is_told_by_its_name():
    ramped = [
        plan(index(LENGTHS), batches=ramped_batches(start=1, increment=1, packs=packs, size=2))
        for packs in (10, 20)
    ]
    changed = {name for name, value in ramped[0].facts.items() if ramped[1].facts[name] != value}
    assert changed == {"optim.batch_rampup"}
    assert "optim.batch_rampup" not in plan(index(LENGTHS)).facts


def test_a_stage_of_the_curriculum_begins_in_the_middle_of_a_ramp_up():
    stages = (CurriculumStage(max_sample_tokens=30), CurriculumStage(from_step=3))
    batches = ramped_batches(start=2, increment=2, packs=8, size=6)
    assert [batches.size(step) for step in range(5)] == [2, 2, 4, 6, 6]
    planned = plan(index(LENGTHS), batches=batches, curriculum=stages)
    second = [pack for step in range(3, 60) for pack in planned.packs_of_step(step)]
    epoch = second[0].epoch
    drawn = [sample.row for pack in second if pack.epoch == epoch for sample in pack.samples]
    assert sorted(drawn) == list(range(200))
    alone = plan(index(LENGTHS), batches=batches, curriculum=stages)
    assert alone.packs_of_step(30) == planned.packs_of_step(30)


def test_fingerprint_follows_everything_that_decides_the_order():
    base = plan(index(LENGTHS)).fingerprint
    assert plan(index(LENGTHS)).fingerprint == base
    others = [
        plan(index(LENGTHS), seed=2),
        plan(index(LENGTHS), batch=4),
        plan(index(LENGTHS, repeat=2.0)),
        plan(index(LENGTHS, name="c")),
        plan(index(LENGTHS), max_pack_tokens=200),
        plan(index(LENGTHS), max_pack_tiles=20),
        plan(index(LENGTHS), shuffle=False),
        plan(index(LENGTHS), curriculum=(CurriculumStage(max_sample_tokens=50),)),
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 9
