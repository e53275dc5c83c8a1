"""Our adapter around Transformer Engine's attention, with a stand-in that records what it is given.

The stand-in attends like the real one is documented to; the real one runs on a GPU only (tests/gpu).
"""

import importlib
import os
import sys
import types
from functools import partial

import megatron.core.extensions.transformer_engine as mcore_extension
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace
from megatron_v2pe.inference.chunks import plan_chunks
from megatron_v2pe.parallel.attention.documents import padding_counts_as_tokens
from megatron_v2pe.parallel.attention.native import NativeContextAttention
from megatron_v2pe.v2pe.rope import apply_rotary
from tests.support.packs import sample

SMALL = dict(num_layers=1, hidden_size=16, num_attention_heads=2, num_query_groups=1, attention_dropout=0.0)
CONFIG = TransformerConfig(**SMALL)
REAL, PADDED = torch.tensor([0, 5, 11], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)


class StandIn(NativeContextAttention):
    """Same call as mcore's wrapper: mask type and packed parameters by position."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **kwargs):
        super().__init__(config, layer_number, attn_mask_type, attention_type, **kwargs)
        self.config = config

    def forward(
        self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None
    ):
        self.given = packed_seq_params
        return super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            packed_seq_params=packed_seq_params,
        )


@pytest.fixture
def adapter(monkeypatch):
    name = "megatron_v2pe.parallel.attention.te"
    monkeypatch.setattr(mcore_extension, "TEDotProductAttention", StandIn)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).RotaryTEAttention(CONFIG, 3, AttnMaskType.causal, "self")
    sys.modules.pop(name, None)


def params(angles, **fields):
    return V2PEPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=REAL,
        cu_seqlens_kv=REAL,
        cu_seqlens_q_padded=PADDED,
        cu_seqlens_kv_padded=PADDED,
        max_seqlen_q=6,
        max_seqlen_kv=6,
        rotary_angles=angles,
        **fields,
    )


def draw(tokens=12):
    torch.manual_seed(0)
    return [torch.randn(tokens, heads, 8) for heads in (2, 1, 1)], torch.rand(tokens, 4) * 6


def test_rotates_and_passes_plain_parameters_without_padding(adapter):
    (query, key, value), angles = draw()
    out = adapter(
        query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params(angles)
    )
    assert type(adapter.given) is PackedSeqParams
    assert adapter.given.cu_seqlens_q is adapter.given.cu_seqlens_q_padded is PADDED
    assert adapter.given.cu_seqlens_kv is adapter.given.cu_seqlens_kv_padded is PADDED
    assert (adapter.given.max_seqlen_q, adapter.given.qkv_format) == (6, "thd")
    native = NativeContextAttention(CONFIG, 3, AttnMaskType.causal, "self")
    rotated = apply_rotary(query, angles), apply_rotary(key, angles), value
    assert torch.equal(out, native(*rotated, packed_seq_params=adapter.given))


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_decodes_with_a_cache_as_the_native_core_does(adapter, window):
    (query, key, value), angles = draw()
    config = TransformerConfig(**SMALL, window_size=window)
    adapter = type(adapter)(config, 3, AttnMaskType.causal, "self")

    outs = []
    native = NativeContextAttention(config, 3, AttnMaskType.causal, "self")
    for attend in (partial(adapter, attention_mask=None, attn_mask_type=AttnMaskType.causal), native):
        cache = KVCache(KVPlace())
        (chunk,) = plan_chunks(sample([len(query)]), chunk_tokens=100)
        cache.reserve([chunk], 0)
        given = params(angles, kv_cache=cache.note_chunk(chunk))
        outs.append(attend(query, key, value, packed_seq_params=given))
        assert list(cache.blocks[0][0].layers) == [3]
    assert torch.equal(*outs)
    assert not hasattr(adapter, "given")


def test_unpacked_sequences_are_refused(adapter):
    query = torch.zeros(4, 1, 2, 8)
    with pytest.raises(ValueError, match="packed sequences"):
        adapter(query, query, query, None, attn_mask_type=AttnMaskType.causal)


def test_without_padded_boundaries_the_real_ones_are_used():
    plain = padding_counts_as_tokens(PackedSeqParams(qkv_format="thd", cu_seqlens_q=REAL, cu_seqlens_kv=REAL))
    assert plain.cu_seqlens_q is plain.cu_seqlens_kv_padded is REAL


@pytest.mark.parametrize(
    ("dtype", "asked", "wanted"), [("bfloat16", None, "0"), ("float32", None, None), ("bfloat16", "1", "1")]
)
def test_unfused_attention_is_ruled_out_in_half_precision(adapter, monkeypatch, dtype, asked, wanted):
    """It forms all scores, and would be chosen in silence; whoever asks for it gets it."""
    monkeypatch.setenv("NVTE_UNFUSED_ATTN", asked or "")
    if asked is None:
        monkeypatch.delenv("NVTE_UNFUSED_ATTN")
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        params_dtype=getattr(torch, dtype),
        attention_dropout=0.0,
    )
    type(adapter)(config, 1, AttnMaskType.causal, "self")
    assert os.environ.get("NVTE_UNFUSED_ATTN") == wanted


def test_with_a2a_it_is_built_for_a_share_of_the_heads(adapter):
    """The exchange is ours, without a wait for each document; Transformer Engine sees no context parallelism."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        context_parallel_size=2,
        attention_dropout=0.0,
    )
    groups = types.SimpleNamespace(cp="the group")
    built = {
        comm: type(adapter)(
            config, 1, AttnMaskType.causal, "self", cp_comm_type=comm, pg_collection=groups
        ).config
        for comm in ("a2a", "p2p")
    }
    assert [built["a2a"].context_parallel_size, built["p2p"].context_parallel_size] == [1, 2]
    assert (built["a2a"].num_attention_heads, built["a2a"].num_query_groups) == (2, 1)
    assert config.num_attention_heads == 4


def test_windows_are_passed_on_and_need_one_rank_or_a2a(adapter):
    """mcore gives Transformer Engine's module `window_size`; in training nothing is done here."""
    groups = types.SimpleNamespace(cp="the group")
    windowed = {**SMALL, "num_query_groups": 2, "window_size": (3, 0)}
    build = partial(type(adapter), attn_mask_type=AttnMaskType.causal, attention_type="self")
    alone = build(TransformerConfig(**windowed), 1)
    assert alone.config.window_size == (3, 0)
    shared = TransformerConfig(**windowed, context_parallel_size=2)
    assert build(shared, 1, cp_comm_type="a2a", pg_collection=groups).config.window_size == (3, 0)
    with pytest.raises(ConfigError, match=r"cp_comm_type is 'p2p', but .* ring has no sliding windows"):
        build(shared, 1, cp_comm_type="p2p", pg_collection=groups)
    shared.window_attn_skip_freq = 1  # no layer has one
    assert build(shared, 1, cp_comm_type="p2p", pg_collection=groups).window is None


def test_sinks_are_refused(adapter):
    config = TransformerConfig(**SMALL, softmax_type="learnable", use_cpu_initialization=True)
    with pytest.raises(ConfigError, match=r"softmax_type is 'learnable', but .* unpacked sequences only"):
        type(adapter)(config, 1, AttnMaskType.causal, "self")
