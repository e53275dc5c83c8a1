"""Shares of tiles and normalisation of pixels."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_v2pe.batch.packed_batch import normalize_tiles, tile_share
from megatron_v2pe.batch.pixel_norm import PixelNorm


@given(st.integers(0, 200), st.integers(1, 16))
def test_tiles_are_shared_evenly_and_completely(num_tiles, num_ranks):
    shares = [tile_share(num_tiles, num_ranks, rank) for rank in range(num_ranks)]
    assert [tile for start, stop in shares for tile in range(start, stop)] == list(range(num_tiles))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


def test_normalisation_is_the_releases_arithmetic():
    tiles = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 2, 2)
    norm = PixelNorm((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    values = tiles.numpy().astype(np.float32) / np.float32(255)
    for channel in range(3):
        values[:, channel] = (values[:, channel] - np.float32(norm.mean[channel])) / np.float32(
            norm.std[channel]
        )
    assert np.array_equal(normalize_tiles(tiles, norm).numpy(), values)
