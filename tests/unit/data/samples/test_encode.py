"""Records to samples: layouts, draws of strides and qualities, cuts that are refused."""

import dataclasses

import numpy as np
import pytest

from megatron_v2pe.config.schema import PositionConfig
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.samples.draw import Draw, encode_draw, read_sample, record_tiles
from megatron_v2pe.data.samples.records import parse_record
from tests.support.mixture import entry, measure, record, write_image

SIZES = (((300, 200),), ((100, 100),))


def parsed(values, dataset):
    return parse_record(values, entry=dataset, sample_id="set:1", where="a.jsonl:1")


@pytest.fixture
def settings(mixture):
    return mixture.settings()


def encode(settings, dataset, *, draw=None, **changes):
    settings = dataclasses.replace(settings, **changes)
    values = record("see <image> and <image>", "two things", ["x.png", "y.png"])
    draw = draw or Draw(epoch=0)
    return encode_draw(parsed(values, dataset), SIZES, entry=dataset, settings=settings, draw=draw)


def test_layout_says_where_the_visual_tokens_are(settings):
    sample = encode(settings, entry())
    image_token = settings.text.tokenizer.image_token_id
    layout = sample.layout
    assert layout.num_tiles.tolist() == [
        image.grid.num_tiles for each in sample.media for image in each.images
    ]
    expected = np.concatenate(
        [
            np.arange(start, start + 16 * tiles)
            for start, tiles in zip(layout.image_starts, layout.num_tiles, strict=True)
        ]
    )
    assert np.array_equal(np.flatnonzero(sample.tokens == image_token), expected)


def test_limits_of_the_data_set_override_those_of_the_run(settings):
    default = encode(settings, entry())
    fewer = encode(settings, entry(max_dynamic_patch=2))
    single = encode(settings, entry(dynamic_image_size=False))
    assert default.layout.num_tiles.tolist() == [5, 1]
    assert fewer.layout.num_tiles.tolist() == [3, 1]
    assert single.layout.num_tiles.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("position", "strides"),
    [
        (PositionConfig(), [16, 16]),
        (PositionConfig(mode="v2pe_fixed", stride=4), [4, 4]),
    ],
)
def test_fixed_modes(settings, position, strides):
    assert encode(settings, entry(), position=position).layout.strides.tolist() == strides


def test_random_strides_depend_on_seed_epoch_and_occurrence_only(settings):
    random = PositionConfig(mode="v2pe_random")

    def strides(epoch, occurrence=0, seed=42):
        draws = [
            encode(
                settings,
                entry(),
                position=random,
                seed=seed,
                draw=Draw(epoch=epoch + number, occurrence=occurrence),
            ).layout.strides.tolist()
            for number in range(12)
        ]
        return draws

    assert strides(0) == strides(0)
    assert strides(0) != strides(0, occurrence=1)
    assert strides(0) != strides(0, seed=43)
    assert len(set(map(tuple, strides(0)))) > 1
    assert {stride for draw in strides(0) for stride in draw} <= {1, 2, 4, 8, 16}


def test_augmentation_draws_a_quality_for_every_tile_of_a_draw(settings):
    dataset = entry(data_augment=True)
    values = parsed(record("<image> <image>", "ok", ["x.png", "y.png"]), dataset)

    def qualities(draw):
        media = record_tiles(values, SIZES, entry=dataset, settings=settings, draw=draw)
        return [image.jpeg_qualities for each in media for image in each.images]

    first = qualities(Draw(epoch=0))
    assert [len(each) for each in first] == [5, 1]
    assert all(75 <= quality <= 100 for each in first for quality in each)
    assert qualities(Draw(epoch=0)) == first
    assert qualities(Draw(epoch=1)) != first
    assert qualities(None) == [(), ()]


def test_padding_to_a_square_needs_one_tile_and_no_augmentation(settings):
    def colors(**changes):
        dataset = entry(dynamic_image_size=False, **changes)
        values = parsed(record("<image>", "ok", ["x.png"]), dataset)
        padded = dataclasses.replace(settings, pad2square=True)
        (file,) = record_tiles(values, SIZES[:1], entry=dataset, settings=padded)
        return file.images[0].pad_color

    assert colors() == (123, 116, 103)
    assert colors(data_augment=True) is None


def test_a_cut_through_an_image_names_it(mixture):
    settings = mixture.settings(max_sample_tokens=130)
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*exceed data\.max_sample_tokens = 130.*image 1 of 2"):
        encode(settings, entry())


def test_a_cut_that_leaves_no_answer_is_refused(mixture):
    settings = mixture.settings(max_sample_tokens=100)
    values = parsed(record("word " * 50, "answer"), entry())
    with pytest.raises(DataError, match="no supervised token is left after the cut"):
        encode_draw(values, (), entry=entry(), settings=settings, draw=Draw(epoch=0))


def test_a_record_without_answer_is_refused(settings):
    values = parsed(record("word", ""), entry())
    with pytest.raises(DataError, match="no supervised token exists"):
        encode_draw(values, (), entry=entry(), settings=settings, draw=Draw(epoch=0))


def test_measured_lengths_are_those_of_the_encoded_sample(mixture, settings):
    write_image(mixture.folder / "images" / "x.png", 300, 200)
    dataset = entry(root=str(mixture.folder / "images"))
    line = b'{"image": "x.png", "conversations": [{"from": "human", "value": "see"}, ' + (
        b'{"from": "gpt", "value": "two things"}]}'
    )
    measured = measure(line, 1, entry=dataset, settings=settings)
    sample = read_sample(line, 1, measured.sizes, entry=dataset, settings=settings, draw=Draw(epoch=3))
    assert measured.num_tokens == len(sample.tokens) == sample.layout.num_tokens
    assert measured.num_supervised == (sample.labels >= 0).sum()
    assert (measured.num_tiles, measured.sizes) == (5, (((300, 200),),))
    with pytest.raises(DataError, match="has 1 images and videos, but had 2 when lengths were measured"):
        read_sample(line, 1, SIZES, entry=dataset, settings=settings, draw=Draw(epoch=0))
