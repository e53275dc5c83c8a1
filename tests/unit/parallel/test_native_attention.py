"""The native attention core as mcore calls it: packed, unpacked, rotated, decoding, and what it refuses."""

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace, token_step
from megatron_v2pe.inference.chunks import plan_chunks
from megatron_v2pe.parallel.attention import kernels
from megatron_v2pe.parallel.attention.block_batches import block_batches, early_rows
from megatron_v2pe.parallel.attention.documents import local_lengths
from megatron_v2pe.parallel.attention.native import NativeContextAttention
from megatron_v2pe.parallel.attention.rotary import rotate
from megatron_v2pe.v2pe.rope import apply_rotary
from tests.support.packs import sample

LENGTHS = (3, 1, 5, 3, 3)
HEADS, KEY_HEADS, DIM = 4, 2, 8


def core(*, mask=AttnMaskType.causal, **changes):
    settings = dict(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, attention_dropout=0.0)
    config = TransformerConfig(**{**settings, "num_query_groups": KEY_HEADS, **changes})
    return NativeContextAttention(config, 1, mask, "self", cp_comm_type="p2p")


def packed(params_class=PackedSeqParams, **fields):
    boundaries = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return params_class(qkv_format="thd", **dict.fromkeys(names, boundaries), **fields)


def draw(*heads, dtype=torch.float64, tokens=15):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, count, DIM, generator=generator, dtype=dtype) for count in heads]


def plain(query, key, value, *, causal=True):
    """Softmax attention [s, h, d] of one document by the formula."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * DIM**-0.5
    if causal:
        past = scores.shape[2] - scores.shape[1]
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + past)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("hst,thd->shd", scores.softmax(-1), value)


def angles_of(tokens):
    return torch.rand(tokens, DIM // 2, generator=torch.Generator().manual_seed(1)) * 6.0


def test_packed_documents_do_not_see_each_other():
    query, key, value = draw(HEADS, KEY_HEADS, KEY_HEADS)
    out = core()(query, key, value, packed_seq_params=packed())
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    expected = torch.cat([plain(*part) for part in parts]).flatten(1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_queries_and_keys_are_rotated_by_the_given_angles():
    query, key, value = draw(HEADS, KEY_HEADS, KEY_HEADS)
    angles = angles_of(len(query))
    out = core()(query, key, value, packed_seq_params=packed(V2PEPackedSeqParams, rotary_angles=angles))
    by_hand = core()(
        apply_rotary(query, angles), apply_rotary(key, angles), value, packed_seq_params=packed()
    )
    assert torch.equal(out, by_hand)
    unrotated = core()(query, key, value, packed_seq_params=packed(V2PEPackedSeqParams))
    assert (out - unrotated).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, 1.19])
@pytest.mark.parametrize("rounded", [False, True])
def test_gradient_of_the_rotation_is_that_of_its_formula(rounded, scale):
    query, key = draw(HEADS, KEY_HEADS, dtype=torch.float32)
    options = dict(rotary_angles=angles_of(len(query)), rotary_scale=scale, round_rotary=rounded)
    params = packed(V2PEPackedSeqParams, **options)
    for position, x in enumerate((query, key)):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        rotated = rotate(*((leaf, key) if position == 0 else (query, leaf)), params)[position]
        formula = apply_rotary(other, params.rotary_angles, scale=scale, round_tables=rounded)
        assert torch.equal(rotated, formula)
        weights = torch.randn_like(x)
        rotated.backward(weights)
        formula.backward(weights)
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-6)


def test_angles_of_another_length_are_refused():
    query, key = draw(HEADS, KEY_HEADS)
    params = packed(V2PEPackedSeqParams, rotary_angles=angles_of(4))
    with pytest.raises(ValueError, match="4 rotary angles for 15 local tokens"):
        rotate(query, key, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [AttnMaskType.no_mask, AttnMaskType.causal])
def test_unpacked_tiles_attend_within_themselves(dtype, mask):
    tiles, tokens = 3, 7
    query, key, value = (x.view(tokens, tiles, -1, DIM) for x in draw(4, 4, 4, dtype=dtype, tokens=21))
    out = core(mask=mask, num_query_groups=HEADS)(query, key, value)
    assert out.shape == (tokens, tiles, HEADS * DIM)
    assert out.dtype == dtype
    for tile in range(tiles):
        part = (x[:, tile].double() for x in (query, key, value))
        expected = plain(*part, causal=mask is AttnMaskType.causal).flatten(1)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[:, tile].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [(15,), (9, 1, 1, 4)])
def test_generation_with_a_cache_equals_one_pass_over_the_document(steps):
    """Prefill chunks, and single tokens as a decoding step."""
    query, key, value = draw(HEADS, KEY_HEADS, KEY_HEADS)
    angles = angles_of(len(query))
    cache, found, start = KVCache(KVPlace()), [], 0
    for length in steps:
        new = slice(start, start + length)
        if length == 1:
            cache.reserve([], 1)
            step = token_step([cache])
        else:
            (chunk,) = plan_chunks(sample([start + length]), chunk_tokens=100, start=start)
            cache.reserve([chunk], 0)
            step = cache.note_chunk(chunk)
        params = packed(V2PEPackedSeqParams, rotary_angles=angles[new], kv_cache=step)
        found.append(core()(query[new], key[new], value[new], packed_seq_params=params))
        start += length
    expected = plain(apply_rotary(query, angles), apply_rotary(key, angles), value).flatten(1)
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-13)
    assert [len(block.layers) for block, _ in cache.blocks] == [1] * len(steps)


def test_bfloat16_gradients_come_back_in_bfloat16():
    leaves = [x.requires_grad_() for x in draw(HEADS, KEY_HEADS, KEY_HEADS, dtype=torch.bfloat16)]
    out = core()(*leaves, packed_seq_params=packed())
    out.backward(torch.ones_like(out))
    assert {out.dtype, *(leaf.grad.dtype for leaf in leaves)} == {torch.bfloat16}


def test_host_lengths_are_read_once_per_micro_batch():
    params = packed()
    assert local_lengths(params, 1) == LENGTHS
    params.cu_seqlens_q_padded = None
    params.cu_seqlens_q = None
    assert local_lengths(params, 1) == LENGTHS


def blocks_of(lengths, *, rank, source):
    """Rows of queries and keys, number of blocks, diagonal; indices as lists."""
    batches = block_batches(lengths, rank=rank, source=source, device=torch.device("cpu"))
    plain_rows = [
        [rows if isinstance(rows, slice) else rows.tolist() for rows in (batch.queries, batch.keys)]
        for batch in batches
    ]
    return [(*rows, batch.blocks, batch.causal) for rows, batch in zip(plain_rows, batches, strict=True)]


def test_masked_blocks_are_never_computed():
    whole, early, late = slice(0, 4), slice(0, 2), slice(2, 4)
    assert blocks_of((4,), rank=1, source=1) == [(whole, whole, 1, True)]
    assert blocks_of((4,), rank=1, source=0) == [(whole, early, 1, False)]
    assert blocks_of((4,), rank=1, source=2) == [(late, whole, 1, False)]
    assert blocks_of((2, 0, 4), rank=0, source=1) == [
        (slice(1, 2), slice(0, 2), 1, False),
        (slice(4, 6), slice(2, 6), 1, False),
    ]


def test_a_ring_brings_the_early_rows_of_lower_ranks_alone():
    lengths, cpu = (4, 2, 0, 4), torch.device("cpu")
    assert early_rows(lengths, device=cpu).tolist() == [0, 1, 4, 6, 7]
    assert early_rows((4,), device=cpu) == slice(0, 2)
    for source in (0, 1, 2):
        rows = torch.arange(sum(lengths))
        brought = rows[early_rows(lengths, device=cpu)] if source < 1 else rows
        found, wanted = (
            block_batches(lengths, rank=1, source=source, device=cpu, early_alone=alone)
            for alone in (True, False)
        )
        assert [brought[batch.keys].tolist() for batch in found] == [
            rows[each.keys].tolist() for each in wanted
        ]


def test_short_documents_of_equal_length_share_a_call():
    assert blocks_of((4, 2, 4), rank=0, source=1) == [
        ([2, 3, 8, 9], [0, 1, 2, 3, 6, 7, 8, 9], 2, False),
        (slice(5, 6), slice(4, 6), 1, False),
    ]
    assert [blocks for *_, blocks, _ in blocks_of((600, 600), rank=0, source=0)] == [1, 1]


def test_shapes_are_known_without_memory():
    query, key, value = (x.to("meta") for x in draw(HEADS, KEY_HEADS, KEY_HEADS, dtype=torch.bfloat16))
    params = packed()
    assert core()(query, key, value, packed_seq_params=params).shape == (15, HEADS * DIM)


def test_a_torch_without_the_kernel_is_named(monkeypatch):
    monkeypatch.setattr(kernels.torch.ops, "aten", object())
    query, key, value = draw(HEADS, KEY_HEADS, KEY_HEADS)
    with pytest.raises(
        ConfigError, match=r"has no aten\._scaled_dot_product_flash_attention_for_cpu; install"
    ):
        core()(query, key, value, packed_seq_params=packed())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"context_parallel_size": 2}, "needs the groups"),
    ],
)
def test_configurations_it_cannot_serve_are_refused(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        core(**changes)


def test_calls_it_cannot_serve_are_refused():
    query, key, value = draw(HEADS, KEY_HEADS, KEY_HEADS)
    with pytest.raises(ValueError, match="no mask and no bias"):
        core()(query, key, value, torch.ones(1), packed_seq_params=packed())
    with pytest.raises(ValueError, match="attended causally"):
        core(mask=AttnMaskType.no_mask)(query, key, value, packed_seq_params=packed())
    with pytest.raises(ValueError, match="documents of 15 local tokens, but 14 queries"):
        core()(query[:14], key[:14], value[:14], packed_seq_params=packed())
