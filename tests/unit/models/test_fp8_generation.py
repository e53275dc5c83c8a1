"""Generation multiplies in bfloat16 where training does in FP8: a new token is one row, and products need 16."""

from types import SimpleNamespace

import pytest

from megatron_v2pe.models.language import LanguageModel


def model(fp8):
    config = SimpleNamespace(fp8=fp8)
    return SimpleNamespace(config=config)


@pytest.mark.parametrize("fp8", ["hybrid", None])
def test_a_batch_with_a_cache_runs_without_it(fp8):
    language = model(fp8)
    with LanguageModel._linears_of(language, SimpleNamespace(kv_cache=object())):
        assert language.config.fp8 is None
    assert language.config.fp8 == fp8
    with LanguageModel._linears_of(language, SimpleNamespace(kv_cache=None)):
        assert language.config.fp8 == fp8


def test_it_is_back_after_an_error():
    language = model("hybrid")
    with pytest.raises(RuntimeError), LanguageModel._linears_of(language, SimpleNamespace(kv_cache=object())):
        raise RuntimeError
    assert language.config.fp8 == "hybrid"
