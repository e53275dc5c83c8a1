"""Long samples: parts between rounds and before images, found again without measuring; policies."""

import json
import time

import pytest

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.index.annotation_index import index_dataset
from megatron_v2pe.data.samples.draw import Draw, read_sample
from megatron_v2pe.data.samples.measure import LineMeasurer, LongSampleError
from megatron_v2pe.data.samples.records import parse_record
from megatron_v2pe.data.samples.split import WHOLE, part_of, rounds_of, split_units
from megatron_v2pe.data.sources.meta import read_meta
from tests.support.mixture import entry, record, write_image


def parsed(*texts, images=0):
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    values = {"conversations": turns, "image": [f"{number}.png" for number in range(images)]}
    return parse_record(values, entry=entry(), sample_id="set:7", where="a.jsonl:7")


QUESTION = parsed("Look: <image> one <image> two <image> Which?", "that", images=3)
ANSWER = parsed("Tell <image>", "a <image> b <image> c", "more?", "no", images=3)


def values(part):
    return [turn.value for turn in part.turns]


def with_rounds(record):
    return record, rounds_of(record)


def num_units(record):
    return sum(each.num_units for each in rounds_of(record))


def test_units():
    assert num_units(QUESTION) == 3
    assert num_units(ANSWER) == 3  # two of the answer's images, and the second round
    assert num_units(parsed("hi", "ho", "again <image>", "yes", images=1)) == 2


def test_parts_of_a_question_keep_its_frame_and_its_answer():
    part, images = part_of(QUESTION, (0, 2))
    assert values(part) == ["Look: <image> one <image> two  Which?", "that"]
    assert (images, part.media, part.sample_id) == ([0, 1], QUESTION.media[:2], "set:7[0:2]")
    part, images = part_of(QUESTION, (1, 3))
    assert values(part) == ["Look: <image> two <image> Which?", "that"]
    assert images == [1, 2]


def test_parts_of_an_answer_repeat_the_question():
    part, images = part_of(ANSWER, (1, 3))
    assert values(part) == ["Tell <image>", "<image> c", "more?", "no"]
    assert images == [0, 2]
    part, images = part_of(ANSWER, (0, 1))
    assert (values(part), images) == (["Tell <image>", "a <image> b "], [0, 1])


def test_all_units_are_the_whole_and_whole_is_the_record_itself():
    for each in (QUESTION, ANSWER):
        part, images = part_of(each, (0, num_units(each)))
        assert (part.turns, part.media, images) == (each.turns, each.media, list(range(3)))
        assert part_of(each, WHOLE)[0] is each


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_splitting_is_greedy_and_complete(most):
    parts = split_units(*with_rounds(parsed(*["q", "a"] * 9)), fits=lambda units: units[1] - units[0] <= most)
    assert [unit for low, high in parts for unit in range(low, high)] == list(range(9))
    assert all(high - low == most for low, high in parts[:-1])


def test_a_unit_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"a\.jsonl:7: is too long, and its part 2 of 3 is as well"):
        split_units(*with_rounds(QUESTION), fits=lambda units: units == (0, 1))


@pytest.fixture
def long_mixture(mixture):
    """One text record, one of eight images, one text of a single too long round."""
    for number in range(8):
        write_image(mixture.folder / "images" / f"{number}.png", 220, 110, seed=number)
    pages = "".join(f"<image> page {number} says so\n" for number in range(8))
    mixture.write(
        [
            record("hello", "hi"),
            record("Read.\n" + pages + "What?", "An answer.", [f"{number}.png" for number in range(8)]),
            record("word " * 900, "end"),
        ]
    )
    return mixture


def index_of(mixture, policy, limit=300, **data):
    (dataset,) = read_meta(mixture.folder / "meta.json")
    settings = mixture.settings(long_samples=policy, max_sample_tokens=limit, max_dynamic_patch=1, **data)
    return index_dataset(dataset, settings=settings, cache_dir=mixture.folder / "cache"), dataset, settings


def test_split_samples_are_measured_and_read_alike(long_mixture):
    index, dataset, settings = index_of(long_mixture, "split")
    assert [bad.line_number for bad in index.bad] == [3]
    assert "its part 1 of 1" in index.bad[0].message
    assert index.bad[0].kind == "long"
    assert len(index) == 3
    lines = (long_mixture.folder / "a.jsonl").read_bytes()
    seen = []
    for row in range(len(index)):
        line = lines[index.offsets[row] :].split(b"\n")[0]
        sample = read_sample(
            line,
            int(index.line_numbers[row]),
            index.media_sizes(row),
            entry=dataset,
            settings=settings,
            draw=Draw(epoch=0),
            units=index.sample_units(row),
        )
        assert len(sample.tokens) == index.num_tokens[row] <= 300
        assert sample.layout.total_tiles == index.num_tiles[row]
        assert sample.sample_id == index.sample_id(row)
        seen += [each.medium.path for each in sample.media]
    assert [path.rsplit("/", 1)[1] for path in seen] == [f"{number}.png" for number in range(8)]
    assert len(set(index.sample_id(row) for row in range(len(index)))) == len(index)


def test_the_tile_budget_splits_too(long_mixture):
    index, _, _ = index_of(long_mixture, "split", limit=4096, max_pack_tiles=3)
    assert index.num_tiles.tolist() == [0, 3, 3, 2, 0]


@pytest.mark.parametrize("policy", ["bad", "refuse"])
def test_long_samples_are_told_apart_from_broken_ones(long_mixture, policy):
    index, _, settings = index_of(long_mixture, policy)
    assert len(index) == 1
    assert [(bad.line_number, bad.kind) for bad in index.bad] == [(2, "long"), (3, "long")]
    with pytest.raises(LongSampleError, match=r"exceed data\.max_sample_tokens = 300"):
        LineMeasurer(index.entry, settings)(json.dumps(record("word " * 900, "end")).encode(), 3)


def test_cut_counts_what_it_cuts(mixture):
    mixture.write([record("hello", "hi there " * 400), record("hello", "hi")])
    index, _, _ = index_of(mixture, "cut")
    assert (index.num_cut, index.num_tokens[0]) == (1, 300)


def test_refuse_stops_a_run_with_the_list_and_bad_counts(long_mixture):
    def load(policy, allowed):
        config = long_mixture.config(
            long_samples=policy, max_sample_tokens=300, max_dynamic_patch=1, max_bad_samples=allowed
        )
        return long_mixture.loader(config)

    with pytest.raises(
        DataError, match=r"2 of 3 samples are too long, and data\.long_samples is refuse"
    ) as caught:
        load("refuse", 1.0)
    assert "a.jsonl:2:" in str(caught.value)
    assert "a.jsonl:3" in str(caught.value)
    with pytest.raises(DataError, match="2 of 3 samples are bad"):
        load("bad", 0.1)
    assert load("bad", 1.0).num_bad == 2
    assert load("split", 1.0).num_samples == 3


def test_a_record_of_thousands_of_turns_is_split_in_a_moment():
    """Rounds are found once: 20,000 turns took minutes while each part looked at all of them."""
    record = parsed(*["q", "a"] * 10_000)
    rounds = rounds_of(record)
    started = time.process_time()

    def fits(units):
        return len(part_of(record, units, rounds=rounds)[0].turns) <= 20

    assert len(split_units(record, rounds, fits=fits)) == 1000
    assert time.process_time() - started < 10
