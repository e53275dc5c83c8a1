"""Ranges of flattened parameters as boxes: every small shape and range by enumeration, one example by eye."""

from math import prod

import pytest
import torch

from megatron_v2pe.checkpoint.state.own_ranges import boxes_of_range


def test_the_example():
    assert list(boxes_of_range((4, 6), 5, 17)) == [((0, 5), (1, 1)), ((1, 0), (1, 6)), ((2, 0), (1, 5))]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (4, 1), (1, 6), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_hold_the_range_in_order_and_nothing_else(shape):
    whole = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            found = list(boxes_of_range(shape, start, stop))
            parts = [
                whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in found
            ]
            joined = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
            assert joined.tolist() == list(range(start, stop)), (start, stop)
            assert len(found) <= max(1, 2 * len(shape) - 1)
            assert all(prod(sizes) for _, sizes in found)
