"""Sliding windows and sinks on one rank against plain float64 softmax with an explicit mask and one logit more.

Forward, every gradient, generation in prefill chunks and token by token, and what mcore's fields select. Tolerances:
float64 1e-12, only the order of sums differs; float32 and bfloat16 by their rounding of outputs and gradients of size 1
to 8.
"""

import types

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace, token_step
from megatron_v2pe.inference.chunks import plan_chunks
from megatron_v2pe.parallel.attention import kernels
from megatron_v2pe.parallel.attention.block_batches import block_batches
from megatron_v2pe.parallel.attention.context_parallel import ring_attention
from megatron_v2pe.parallel.attention.native import NativeContextAttention
from megatron_v2pe.parallel.attention.windows import own_blocks, whole_documents
from tests.support.packs import sample
from tests.support.windowed import draw, errors, reference, windowed_attention

LENGTHS = (3, 1, 17, 8, 1, 40, 9)
WINDOWS = (None, 1, 2, 3, 8, 11, 41)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}
CPU = torch.device("cpu")


@pytest.mark.parametrize("has_sink", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_pack_equals_the_formula(window, has_sink, dtype):
    leaves, grad = draw(LENGTHS, dtype=dtype, has_sink=has_sink)
    *qkv, sink = [x if x is None else x.requires_grad_() for x in leaves]
    out = ring_attention(*qkv, lengths=LENGTHS, scale=qkv[0].shape[-1] ** -0.5, window=window, sink=sink)
    ours = [out.detach(), *torch.autograd.grad(out, [*qkv, *([sink] if has_sink else [])], grad)]
    assert {x.dtype for x in ours} == {dtype}
    found = errors(ours, reference(LENGTHS, window=window, dtype=dtype, has_sink=has_sink))
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize("change", [dict(window=10), dict(window=12), dict(sinks=2)])
def test_a_window_off_by_one_and_a_sink_counted_twice_are_seen(change):
    leaves, _ = draw(LENGTHS, has_sink=True)
    right = windowed_attention(*leaves, LENGTHS, window=11)
    wrong = windowed_attention(*leaves, LENGTHS, **{"window": 11, **change})
    assert float((right - wrong).abs().max()) > 1e-2


def test_a_window_that_holds_every_document_changes_no_bit():
    (query, key, value, _), grad = draw(LENGTHS, dtype=torch.float32)
    found = []
    for window in (None, max(LENGTHS)):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out = ring_attention(*leaves, lengths=LENGTHS, scale=0.3, window=window)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_work_grows_with_the_window_and_not_with_the_square(monkeypatch):
    """Every pair that a kernel is given is seen or lies in a triangle of the window's size."""
    pairs = []

    def counted(q, k, v, *, blocks=1, causal, scale):
        pairs.append(len(q) // blocks * (len(k) // blocks) * blocks)
        return whole(q, k, v, blocks=blocks, causal=causal, scale=scale)

    whole = kernels.block_forward
    monkeypatch.setattr("megatron_v2pe.parallel.attention.blockwise.block_forward", counted)
    for tokens in (512, 1024):
        (query, key, value, _), _ = draw((tokens,), dtype=torch.float32)
        ring_attention(query, key, value, lengths=(tokens,), scale=0.3, window=16)
        assert sum(pairs) <= 2 * 16 * tokens
        pairs.clear()


def test_blocks_of_a_document_are_those_of_the_docstring():
    (diagonal, short), (backwards,) = (
        [each for each in own_blocks(whole_documents([5]), window=3, device=CPU) if each.first == first]
        for first in (True, False)
    )
    assert [(each.queries, each.keys, each.causal) for each in (diagonal, short)] == [
        (slice(0, 3), slice(0, 3), True),
        (slice(3, 5), slice(3, 5), True),
    ]
    assert (backwards.queries.tolist(), backwards.keys.tolist(), backwards.causal) == ([4, 3], [2, 1], True)
    plain = block_batches((5,), rank=0, source=0, device=CPU)
    assert own_blocks(whole_documents([5]), window=5, device=CPU)[0].keys == plain[0].keys


def core(layer_number=1, **changes):
    settings = dict(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    settings |= dict(attention_dropout=0.0, use_cpu_initialization=True, params_dtype=torch.float64)
    config = TransformerConfig(**{**settings, **changes})
    return NativeContextAttention(config, layer_number, AttnMaskType.causal, "self", cp_comm_type="p2p")


OSS = dict(softmax_type="learnable", window_size=(10, 0), window_attn_skip_freq=2)


@pytest.mark.parametrize("steps", [(40,), (9, 1, 1, 24, 1, 4), (1,) * 3 + (12, 12, 13)])
@pytest.mark.parametrize("window", [None, 1, 2, 11, 12, 64])
def test_generation_with_a_cache_equals_one_pass(steps, window):
    """Prefill chunks, and single tokens as a decoding step."""
    leaves, _ = draw((40,), has_sink=True)
    *qkv, sink = leaves
    layer = core(softmax_type="learnable", window_size=None if window is None else (window - 1, 0))
    layer.softmax_offset.data.copy_(sink)
    cache, found, start = KVCache(KVPlace()), [], 0
    for length in steps:
        if length == 1:
            cache.reserve([], 1)
            step = token_step([cache])
        else:
            (chunk,) = plan_chunks(sample([start + length]), chunk_tokens=100, start=start)
            cache.reserve([chunk], 0)
            step = cache.note_chunk(chunk)
        params = V2PEPackedSeqParams(qkv_format="thd", kv_cache=step)
        found.append(layer(*(x[start : start + length] for x in qkv), packed_seq_params=params))
        start += length
    expected = windowed_attention(*leaves, (40,), window=window).flatten(1)[:start]
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["model", "int8"])
def test_a_window_reads_only_its_rows_of_the_cache(kind):
    """What came before the window may be anything."""
    leaves, _ = draw((40,), dtype=torch.float32)
    layer = core(window_size=(4, 0), params_dtype=torch.float32)
    found = []
    for spoil in (False, True):
        key, value = leaves[1].clone(), leaves[2].clone()
        if spoil:
            key[:31], value[:31] = 50.0, float("nan")
        cache = KVCache(KVPlace(kind=kind))
        for start, stop in ((0, 31), (31, 35), (35, 36)):
            new = slice(start, stop)
            (chunk,) = plan_chunks(sample([stop]), chunk_tokens=100, start=start)
            cache.reserve([chunk] if stop - start > 1 else [], 1)
            step = cache.note_chunk(chunk) if stop - start > 1 else token_step([cache])
            params = V2PEPackedSeqParams(qkv_format="thd", kv_cache=step)
            out = layer(leaves[0][new], key[new], value[new], packed_seq_params=params)
        found.append(out)
    assert torch.equal(*found)


def test_mcores_fields_select_layers_and_own_the_parameter():
    assert [core(number, **OSS).window for number in (1, 2, 3, 4)] == [11, None, 11, None]
    assert [
        core(number, **{**OSS, "window_attn_skip_freq": [0, 1, 1, 0]}).window for number in (1, 2, 4)
    ] == [
        None,
        11,
        None,
    ]
    layer = core(**OSS)
    assert list(layer.state_dict()) == ["softmax_offset"]
    assert (layer.softmax_offset.shape, layer.softmax_offset.dtype) == ((4,), torch.float64)
    assert (layer.softmax_offset.tensor_model_parallel, layer.softmax_offset.partition_dim) == (True, 0)
    assert 0 < float(layer.softmax_offset.detach().std()) < 0.1  # mcore's init_method, 0.02
    assert list(core().parameters()) == []


def test_tensor_parallel_ranks_have_shares_of_one_drawing():
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        softmax_type="learnable",
    )
    drawn = []
    for size in (1, 2):
        for rank in range(size):
            group = types.SimpleNamespace(size=lambda size=size: size, rank=lambda rank=rank: rank)
            torch.manual_seed(3)
            layer = NativeContextAttention(
                config, 1, AttnMaskType.causal, "self", pg_collection=types.SimpleNamespace(tp=group)
            )
            drawn.append(layer.softmax_offset)
    assert torch.equal(torch.cat(drawn[1:]), drawn[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(softmax_type="off-by-one"), "native attention has vanilla and learnable"),
        (dict(window_size=(4, 1)), r"window_size is \(4, 1\), but a decoder's window is \(w - 1, 0\)"),
        (dict(window_size=(-1, 0)), r"window_size is \(-1, 0\)"),
    ],
)
def test_what_it_does_not_have_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        core(**changes)


@pytest.mark.parametrize("changes", [dict(softmax_type="learnable"), dict(window_size=(4, 0))])
def test_unpacked_sequences_are_refused(changes):
    query = torch.zeros(4, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="windows and sinks need packed_seq_params"):
        core(**changes)(query, query[:, :, :2], query[:, :, :2])
