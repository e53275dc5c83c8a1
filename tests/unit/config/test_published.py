"""The true sizes parse, and add up to the parameters that are published for them."""

import pytest

from megatron_v2pe.checkpoint.hf.name_map import family_name, name_map
from megatron_v2pe.config.architecture import parse_architecture
from megatron_v2pe.config.published import PUBLISHED

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


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_add_up(size):
    arch = parse_architecture(PUBLISHED[size])
    assert family_name(arch) == FAMILIES[size]
    assert round(name_map(arch).num_parameters / 1e6) == MILLIONS[size]
    assert arch.tokens_per_tile == 256


def test_2b_has_the_released_number_of_tensors():
    names = name_map(parse_architecture(PUBLISHED["2B"]))
    assert (len(names.by_hf), names.num_parameters) == (517, 2_205_754_368)
