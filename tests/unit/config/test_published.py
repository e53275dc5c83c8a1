"""The true sizes parse, and add up to the parameters that are published for them."""

import math

import pytest

from megatron_v2pe.checkpoint.hf.name_map import family_name, name_map
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED, published_key

# In millions, as the model cards have them.
MILLIONS = {"1B": 938, "2B": 2206, "4B": 4147, "8B": 8075, "26B": 25514, "40B": 40069, "76B": 76262}
FAMILIES = {
    "1B": "qwen2_vit300m",
    "2B": "internlm2_vit300m",
    "4B": "phi3_vit300m",
    "8B": "internlm2_vit300m",
    "26B": "internlm2_vit6b",
    "40B": "llama_vit6b",
    "76B": "llama_vit6b",
}


# Language model alone, in billions: the README of InternVL3.5, and the cards of Qwen and InternLM.
SERIES = {
    "2.5-1B": 0.63, "2.5-2B": 1.89, "2.5-4B": 3.40, "2.5-8B": 7.74, "2.5-26B": 19.86, "2.5-38B": 32.76,
    "2.5-78B": 72.70,
    "3-1B": 0.63, "3-2B": 1.78, "3-8B": 7.61, "3-9B": 8.80, "3-14B": 14.77, "3-38B": 32.76, "3-78B": 72.70,
    "3.5-1B": 0.75, "3.5-2B": 2.03, "3.5-4B": 4.41, "3.5-8B": 8.19, "3.5-14B": 14.77, "3.5-38B": 32.76,
    "3.5-20B-A4B": 20.91, "3.5-30B-A3B": 30.53, "3.5-241B-A28B": 235.09,
}  # fmt: skip


@pytest.mark.parametrize("size", SERIES)
def test_later_series_have_the_published_language_models(size):
    names = name_map(parse_architecture(PUBLISHED[size]))
    language = [entry for entry in names.by_ours.values() if entry.ours.startswith("language.")]
    numbers = sum(math.prod(shape) for entry in language for shape in entry.hf_shapes)
    assert round(numbers / 1e9, 2) == SERIES[size]


def test_every_published_size_is_checked():
    assert set(PUBLISHED) == set(MILLIONS) | set(SERIES)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("InternVL3_5-8B", "3.5-8B"),
        ("internvl2-2b", "2B"),
        ("2B", "2B"),
        ("InternVL2.5-4B", "2.5-4B"),
        ("3-2B", "3-2B"),
    ],
)
def test_names_of_published_models(name, key):
    assert published_key(name) == key
    assert key in PUBLISHED


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_add_up(size):
    arch = parse_architecture(PUBLISHED[size])
    assert family_name(arch) == FAMILIES[size]
    assert round(name_map(arch).num_parameters / 1e6) == MILLIONS[size]
    assert arch.tokens_per_tile == 256


def test_2b_has_the_released_number_of_tensors():
    names = name_map(parse_architecture(PUBLISHED["2B"]))
    assert (len(names.by_hf), names.num_parameters) == (517, 2_205_754_368)
