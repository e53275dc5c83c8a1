"""Packs: shifted labels, weights, padding and tile ranges, on samples small enough to see."""

import math

import numpy as np
import pytest

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.collate import collate_pack, token_weights
from megatron_v2pe.data.media.cut import ImageTiles
from megatron_v2pe.data.media.image import ImageFile
from megatron_v2pe.data.media.medium import MediumTiles
from megatron_v2pe.data.media.tiling import TileGrid
from megatron_v2pe.data.samples.encode import EncodedSample
from megatron_v2pe.v2pe.layout import SampleLayout, text_layout
from tests.support.mixture import write_image

X = IGNORE_INDEX


def sample(labels, *, name="s"):
    labels = np.array(labels, dtype=np.int64)
    return EncodedSample(
        tokens=np.arange(10, 10 + len(labels)),
        labels=labels,
        layout=text_layout(len(labels), tokens_per_tile=1),
        media=(),
        sample_id=name,
    )


def collate(samples, *, pad=1, reduction="token", **changes):
    return collate_pack(
        samples, pad_to_multiple=pad, pad_token_id=2, loss_reduction=reduction, image_size=8, **changes
    )


def test_labels_shift_inside_each_document_and_never_across():
    pack = collate([sample([X, X, 12, 13]), sample([10, X, 12])], pad=4)
    assert pack.tokens.tolist() == [10, 11, 12, 13, 10, 11, 12, 2]
    assert pack.labels.tolist() == [X, 12, 13, X, X, 12, X, X]
    assert pack.loss_weights.tolist() == [0, 1, 1, 0, 0, 1, 0, 0]
    assert pack.layout.cu_seqlens.tolist() == [0, 4, 8]
    assert pack.sample_ids == ("s", "s")


def test_the_last_document_fills_the_pack():
    pack = collate([sample([X, X, 12, 13]), sample([10, X, 12])], pad=4, pack_multiple=16)
    assert pack.layout.cu_seqlens.tolist() == [0, 4, 16]
    assert pack.tokens.tolist() == [10, 11, 12, 13, 10, 11, 12, *[2] * 9]
    assert pack.labels.tolist() == [X, 12, 13, X, X, 12, *[X] * 10]
    assert pack.loss_weights.sum() == 3


@pytest.mark.parametrize(
    ("reduction", "weight"), [("token", 1), ("sample", 1 / 3), ("square", 1 / math.sqrt(3))]
)
def test_weight_counts_the_supervised_tokens_before_the_shift(reduction, weight):
    labels = np.array([10, X, 12, 13, X])
    weights = token_weights(labels, loss_reduction=reduction)
    assert weights.dtype == np.float32
    assert weights == pytest.approx(np.array([1, 0, 1, 1, 0]) * weight, abs=1e-7)
    shifted = collate([sample(labels)], reduction=reduction).loss_weights
    assert shifted == pytest.approx(np.array([0, 1, 1, 0, 0]) * weight, abs=1e-7)


def test_an_unsupervised_sample_weighs_nothing():
    pack = collate([sample([X, X]), sample([X, 11])], reduction="sample")
    assert pack.loss_weights.tolist() == [0, 0, 1, 0]


def test_a_pack_without_supervision_names_its_samples():
    with pytest.raises(DataError, match="samples one, two: no token of this pack is supervised"):
        collate([sample([X, X], name="one"), sample([5, X], name="two")])


def test_tiles_of_the_wanted_range_only(tmp_path):
    write_image(tmp_path / "a.png", 20, 10)
    grid = TileGrid(columns=2, rows=1, has_thumbnail=True)
    images = (ImageTiles(size=(20, 10), grid=grid),)
    media = tuple(
        MediumTiles(medium=ImageFile(path=str(tmp_path / name)), images=images)
        for name in ("missing.png", "a.png")
    )
    layout = SampleLayout(
        num_tokens=14,
        image_starts=np.array([1, 6]),
        num_tiles=np.array([3, 3]),
        strides=np.array([1, 1]),
        tokens_per_tile=1,
    )
    document = EncodedSample(
        tokens=np.zeros(14, dtype=np.int64),
        labels=np.full(14, 5),
        layout=layout,
        media=media,
        sample_id="s",
    )
    pack = collate([document], tile_range_of=lambda num_tiles: (num_tiles - 2, num_tiles))
    assert (pack.num_tiles, pack.tile_range, pack.tiles.shape) == (6, (4, 6), (2, 3, 8, 8))
    with pytest.raises(DataError, match=r"missing\.png"):
        collate([document])
