"""Which back end runs, and that it can share sequences as asked; hosts are made up."""

import sys
import types

import megatron.core.extensions.transformer_engine as mcore_extension
import pytest

from megatron_v2pe.assembly import backend_modules
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.native import NativeContextAttention


@pytest.fixture
def host(monkeypatch):
    """Make up a host: host(gpu=..., engine=...)."""

    def make(*, gpu, engine):
        monkeypatch.setattr(backend_modules.torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(backend_modules, "has_module", lambda name: engine)
        for name in ("TEDotProductAttention", "TEColumnParallelLinear", "TERowParallelLinear", "TENorm"):
            monkeypatch.setattr(mcore_extension, name, name, raising=False)
        adapter = types.SimpleNamespace(RotaryTEAttention="RotaryTEAttention")
        monkeypatch.setitem(sys.modules, "megatron_v2pe.parallel.attention.te", adapter)

    return make


def choose(*, dtype="bfloat16", fp8="none", sinks=False, **parallel):
    return backend_modules.choose_modules(ParallelConfig(**parallel), dtype=dtype, fp8=fp8, sinks=sinks)


@pytest.mark.parametrize(("gpu", "engine"), [(False, False), (False, True), (True, False)])
def test_auto_is_native_without_gpu_or_engine(host, gpu, engine):
    host(gpu=gpu, engine=engine)
    for cp_comm_type in ("p2p", "all_gather", "a2a"):
        chosen = choose(cp_comm_type=cp_comm_type)
        assert chosen.language_attention is NativeContextAttention


def test_auto_is_transformer_engine_where_it_runs(host):
    host(gpu=True, engine=True)
    for cp_comm_type in ("p2p", "a2a"):
        chosen = choose(cp_comm_type=cp_comm_type)
        assert chosen.language_attention == "RotaryTEAttention"
        assert (chosen.linear_qkv, chosen.linear_fc1) == ("TEColumnParallelLinear",) * 2


def test_what_auto_found_must_share_sequences_as_asked(host):
    host(gpu=True, engine=True)
    with pytest.raises(ConfigError, match=r"all_gather.*packed.*attention_backend to native"):
        choose(cp_comm_type="all_gather")
    with pytest.raises(ConfigError, match=r"parallel.cp_sharding is 'auto', but Transformer Engine's"):
        choose(cp=2, cp_sharding="auto")
    native = choose(cp_comm_type="all_gather", attention_backend="native")
    assert native.language_attention is NativeContextAttention


def test_sinks_have_native_attention_among_transformer_engines_layers(host):
    """Whatever exchanges native attention has are allowed then."""
    host(gpu=True, engine=True)
    for parallel in (dict(), dict(cp=2, cp_comm_type="all_gather"), dict(cp=2, cp_sharding="auto")):
        chosen = choose(sinks=True, attention_backend="transformer_engine", **parallel)
        assert chosen.language_attention is NativeContextAttention
        assert (chosen.vision_attention, chosen.linear_qkv) == (
            "TEDotProductAttention",
            "TEColumnParallelLinear",
        )


def test_float32_is_transformer_engine_by_name_only(host):
    """Its float32 is tf32 in products, and has no fused attention."""
    host(gpu=True, engine=True)
    for cp_comm_type in ("p2p", "all_gather", "a2a"):
        chosen = choose(dtype="float32", cp_comm_type=cp_comm_type)
        assert chosen.language_attention is NativeContextAttention
    by_name = choose(dtype="float32", attention_backend="transformer_engine")
    assert by_name.language_attention == "RotaryTEAttention"


@pytest.mark.parametrize(
    ("gpu", "engine", "reason"),
    [(False, True, "this host has no GPU"), (True, False, "Transformer Engine is not installed")],
)
def test_transformer_engine_by_name_is_not_replaced(host, gpu, engine, reason):
    host(gpu=gpu, engine=engine)
    with pytest.raises(ConfigError, match=reason):
        choose(attention_backend="transformer_engine")


@pytest.mark.parametrize(("gpu", "reason"), [(True, "it is not installed"), (False, "this host has no GPU")])
def test_fp8_products_are_transformer_engines(host, gpu, reason):
    host(gpu=gpu, engine=False)
    with pytest.raises(ConfigError, match=rf"model\.fp8 is 'current', but FP8 products .* and {reason}"):
        choose(fp8="current")
    assert choose().language_attention is NativeContextAttention


@pytest.mark.parametrize("fp8", ["current", "blockwise"])
def test_transformer_engine_says_what_the_gpu_has(host, monkeypatch, fp8):
    host(gpu=True, engine=True)
    answers = {"current": (True, ""), "blockwise": (False, "FP8 block scaled GEMM requires CUDA >= 12.9.")}
    engine = types.SimpleNamespace(
        is_fp8_available=lambda return_reason: answers["current"],
        is_fp8_block_scaling_available=lambda return_reason: answers["blockwise"],
    )
    monkeypatch.setitem(sys.modules, "transformer_engine", types.SimpleNamespace(pytorch=engine))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    if fp8 == "current":
        assert choose(fp8=fp8).language_attention == "RotaryTEAttention"
        answers["current"] = (False, "Device compute capability 8.9 or higher required for FP8 execution.")
    with pytest.raises(
        ConfigError, match=rf"model\.fp8 is '{fp8}', but Transformer Engine says: .* set model\.fp8"
    ):
        choose(fp8=fp8)
