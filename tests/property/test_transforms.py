"""Every transform and its inverse give back the same bits, for any head counts, sizes and dtypes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.checkpoint.hf.transforms import GroupHeads, Same, StackRows, VocabularyRows

SIZES = st.integers(1, 6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_bits(rows: int, columns: int | None, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits, NaN included: a transform may not touch values."""
    shape = (rows,) if columns is None else (rows, columns)
    words = torch.int32 if dtype == torch.float32 else torch.int16
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator).to(words).view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=SIZES,
    queries_per_group=SIZES,
    head_dim=SIZES,
    columns=st.none() | SIZES,
    dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_group_heads_round_trip(kv_heads, queries_per_group, head_dim, columns, dtype, seed):
    heads = kv_heads * queries_per_group
    transform = GroupHeads(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    fused = random_bits((heads + 2 * kv_heads) * head_dim, columns, dtype, seed)
    grouped = transform.to_ours([fused])
    (back,) = transform.to_hf(grouped)
    assert bits(back) == bits(fused)
    (other_way,) = transform.to_hf(fused)
    assert bits(transform.to_ours([other_way])) == bits(fused)


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=SIZES,
    queries_per_group=SIZES,
    head_dim=SIZES,
    columns=st.none() | SIZES,
    dtype=DTYPES,
    seed=st.integers(0, 9),
)
def test_separate_heads_round_trip_and_equal_fused_ones(
    kv_heads, queries_per_group, head_dim, columns, dtype, seed
):
    sizes = dict(num_heads=kv_heads * queries_per_group, num_kv_heads=kv_heads, head_dim=head_dim)
    rows = [kv_heads * queries_per_group * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    parts = [random_bits(count, columns, dtype, seed + i) for i, count in enumerate(rows)]
    separate = GroupHeads(**sizes, is_fused=False)
    ours = separate.to_ours(parts)
    assert bits(ours) == bits(GroupHeads(**sizes).to_ours([torch.cat(parts)]))
    back = separate.to_hf(ours)
    assert [tuple(part.shape) for part in back] == [tuple(part.shape) for part in parts]
    assert [bits(part) for part in back] == [bits(part) for part in parts]


@settings(max_examples=30, deadline=None)
@given(kv_heads=SIZES, queries_per_group=SIZES, head_dim=SIZES)
def test_group_heads_puts_each_head_where_mcore_reads_it(kv_heads, queries_per_group, head_dim):
    """mcore views linear_qkv as [group, queries + key + value, head_dim]."""
    heads = kv_heads * queries_per_group
    transform = GroupHeads(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    fused = torch.arange((heads + 2 * kv_heads) * head_dim)
    q, k, v = (
        part.view(-1, head_dim)
        for part in fused.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    )
    view = transform.to_ours([fused]).view(kv_heads, queries_per_group + 2, head_dim)
    for group in range(kv_heads):
        for j in range(queries_per_group):
            assert torch.equal(view[group, j], q[group * queries_per_group + j])
        assert torch.equal(view[group, -2], k[group])
        assert torch.equal(view[group, -1], v[group])


@settings(max_examples=30, deadline=None)
@given(num_parts=SIZES, rows=SIZES, columns=st.none() | SIZES, dtype=DTYPES)
def test_stack_rows_round_trip(num_parts, rows, columns, dtype):
    parts = [random_bits(rows, columns, dtype, seed) for seed in range(num_parts)]
    stacked = StackRows(num_parts).to_ours(parts)
    assert [bits(part) for part in StackRows(num_parts).to_hf(stacked)] == [bits(part) for part in parts]
    assert bits(stacked) == b"".join(map(bits, parts))  # what lets an importer write each part on its own


@settings(max_examples=30, deadline=None)
@given(vocab=SIZES, padding=st.integers(0, 5), columns=SIZES, dtype=DTYPES)
def test_vocabulary_rows_round_trip(vocab, padding, columns, dtype):
    transform = VocabularyRows(vocab_size=vocab, padded_size=vocab + padding)
    table = random_bits(vocab, columns, dtype, 0)
    padded = transform.to_ours([table])
    assert padded.shape == (vocab + padding, columns)
    assert not padded[vocab:].any()
    (back,) = transform.to_hf(padded)
    assert bits(back) == bits(table)


def test_same_is_the_same_object():
    tensor = torch.ones(2)
    assert Same().to_ours([tensor]) is tensor
    assert Same().to_hf(tensor) == [tensor]
