"""Attention that a window leaves: operations of a document, and how long one is that costs as much as its linears."""

from dataclasses import replace

import pytest

from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.flops import attention_flops, decoder_linear_parameters, linear_tokens
from megatron_v2pe.config.arch.published import PUBLISHED

ARCH = parse_architecture(PUBLISHED["3.5-20B-A4B"])
CHANNELS = 64 * 64


@pytest.mark.parametrize("length", [1, 100, 128, 1000])
def test_pairs_are_those_that_a_token_sees(length):
    """12 layers see a window of 128 tokens, 12 the whole document; a token sees half of itself by convention."""
    windowed = sum(min(i + 0.5, 128.0) for i in range(length))
    whole = sum(i + 0.5 for i in range(length))
    wanted = 4.0 * CHANNELS * 12 * (windowed + whole)
    assert attention_flops(ARCH, [length]) == pytest.approx(wanted, rel=1e-12)
    assert attention_flops(ARCH, [length, length]) == pytest.approx(2 * wanted, rel=1e-12)


def test_the_whole_square_doubles_what_is_no_window():
    causal, square = (attention_flops(ARCH, [10**6], full_attention=full) for full in (False, True))
    assert square - causal == pytest.approx(4.0 * CHANNELS * 12 * 0.5 * 10**12, rel=1e-12)


def test_windowed_layers_count_among_the_linears():
    """At that length the 12 whole layers cost what everything linear in tokens costs."""
    length = linear_tokens(ARCH)
    linears = 2.0 * decoder_linear_parameters(ARCH) * length
    windows = 4.0 * CHANNELS * 12 * 128 * length
    whole = 4.0 * CHANNELS * 12 * 0.5 * length**2
    assert whole == pytest.approx(linears + windows, rel=1e-4)
    without = replace(ARCH, language=replace(ARCH.language, window=0, is_windowed=()))
    assert linear_tokens(without) < length
