"""Tiles in several sizes: the large branch's pixels are those of one size, to the bit; boxes and order are shared."""

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_v2pe.batch.packed_batch import normalize_tiles, normalized, split_rows
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.media.cut import CutRule
from megatron_v2pe.data.media.image import ImageFile, read_header
from megatron_v2pe.data.media.medium import MediaRules, MediumTiles, load_tile_range
from megatron_v2pe.data.media.tiling import TilingRule

NORM = PixelNorm((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def medium(path, *, augment=None):
    rule = CutRule(tiling=TilingRule(image_size=16, max_tiles=6), augment=augment)
    file = ImageFile(path=str(path))
    headers = file.probe(MediaRules(), sample_id="", header_of=read_header)
    return MediumTiles(medium=file, images=file.tiles([header.size for header in headers], rule))


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("seed", [None, 3], ids=["plain", "jpeg"])
def test_the_first_size_is_bit_equal_and_the_second_is_cut_from_the_image(picture, seed):
    augment = None if seed is None else np.random.default_rng(seed)
    media = [medium(picture, augment=augment)]
    count = media[0].num_tiles
    assert count > 2
    one = load_tile_range(media, image_size=16, tile_range=(1, count))
    rows = load_tile_range(media, image_size=16, smaller_sizes=(32,), tile_range=(1, count))
    assert rows.shape == (count - 1, 3 * (16 * 16 + 32 * 32))
    small, large = split_rows(rows, (16, 32))
    assert np.array_equal(small, one)
    assert np.array_equal(large, load_tile_range(media, image_size=32, tile_range=(1, count)))


def test_normalised_rows_hold_each_size_channels_first(picture):
    media = [medium(picture)]
    rows = load_tile_range(media, image_size=16, smaller_sizes=(32,), tile_range=(0, 2))
    found = normalized(torch.from_numpy(rows), NORM, (16, 32)).split([3 * 16 * 16, 3 * 32 * 32], dim=1)
    for part, size in zip(found, (16, 32), strict=True):
        tiles = torch.from_numpy(load_tile_range(media, image_size=size, tile_range=(0, 2)))
        assert torch.equal(part.reshape(2, 3, size, size), normalize_tiles(tiles, NORM))


def test_a_damaged_picture_is_black_in_every_size(picture):
    media = [medium(picture)]
    picture.write_bytes(picture.read_bytes()[:200])
    seen = []
    rows = load_tile_range(
        media,
        image_size=16,
        smaller_sizes=(32,),
        tile_range=(0, 2),
        on_damage=lambda *what: seen.append(what),
    )
    assert not rows.any()
    assert isinstance(seen[0][1], DataError)
