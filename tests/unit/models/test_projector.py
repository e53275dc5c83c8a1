"""Pixel shuffle by hand."""

import pytest
import torch

from megatron_v2pe.models.projector import pixel_shuffle


def grid(side=4):
    """Each patch carries its (row, column) as channels."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([rows, columns], dim=-1)[None]


def test_v2_concatenates_a_square_of_patches():
    tokens = pixel_shuffle(grid(), ratio=0.5, version="v2")
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].reshape(4, 2).tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert tokens[0, 2].reshape(4, 2).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_v1_is_the_transposed_grid():
    v1 = pixel_shuffle(grid(), ratio=0.5, version="v1").reshape(2, 2, 8)
    v2 = pixel_shuffle(grid(), ratio=0.5, version="v2").reshape(2, 2, 8)
    assert torch.equal(v1, v2.transpose(0, 1))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_nothing_is_lost(version):
    x = torch.randn(2, 8, 8, 3)
    assert torch.equal(
        pixel_shuffle(x, ratio=0.5, version=version).flatten().sort()[0], x.flatten().sort()[0]
    )
