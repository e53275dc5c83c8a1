"""Strides depend on the sample and the epoch, on nothing else."""

import numpy as np
import pytest

from megatron_v2pe.v2pe.strides import image_strides, sample_generator, stride_choices


def draw(seed, epoch, sample_id, count=64):
    generator = sample_generator(seed, epoch, sample_id)
    return image_strides("v2pe_random", count, tokens_per_tile=256, generator=generator).tolist()


def test_choices_are_the_papers():
    assert stride_choices(256).tolist() == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert stride_choices(4).tolist() == [1, 2, 4]


def test_a_draw_repeats_and_differs_by_seed_epoch_and_sample():
    first = draw(1, 0, "a")
    assert first == draw(1, 0, "a")
    assert first != draw(2, 0, "a")
    assert first != draw(1, 1, "a")
    assert first != draw(1, 0, "b")


def test_draws_are_uniform():
    counts = np.bincount(np.log2(draw(0, 0, "x", 9000)).astype(int), minlength=9)
    assert counts.sum() == 9000
    assert (abs(counts - 1000) < 150).all()  # 5 standard deviations of a binomial count


def test_fixed_and_default():
    assert image_strides("v2pe_fixed", 2, tokens_per_tile=256, stride=64).tolist() == [64, 64]
    assert image_strides("default", 3, tokens_per_tile=16).tolist() == [16, 16, 16]


def test_missing_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        image_strides("v2pe_fixed", 1, tokens_per_tile=256)
    with pytest.raises(ValueError, match="generator"):
        image_strides("v2pe_random", 1, tokens_per_tile=256)
