"""Rows that are found through the transforms give what the transforms themselves give, for any sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_v2pe.checkpoint.hf.name_map import Entry
from megatron_v2pe.checkpoint.hf.row_runs import RowRun, in_blocks, rows_of_hf, rows_of_ours
from megatron_v2pe.checkpoint.hf.transforms import GroupHeads, Same, StackRows

SIZES = st.integers(1, 5)


@st.composite
def entries(draw):
    kv_heads, queries, head_dim, columns = (draw(SIZES) for _ in range(4))
    sizes = {"num_heads": kv_heads * queries, "num_kv_heads": kv_heads, "head_dim": head_dim}
    q, kv = kv_heads * queries * head_dim, kv_heads * head_dim
    transform, rows = draw(
        st.sampled_from(
            [
                (Same(), [q]),
                (StackRows(2), [q, q]),
                (StackRows(3), [kv, kv, kv]),
                (GroupHeads(**sizes), [q + 2 * kv]),
                (GroupHeads(**sizes, is_fused=False), [q, kv, kv]),
            ]
        )
    )
    names = tuple(f"part{i}" for i in range(len(rows)))
    shapes = tuple((count, columns) for count in rows)
    return Entry(hf=names, ours="ours", hf_shapes=shapes, transform=transform)


def gathered(runs, tensors):
    return torch.cat([tensors[run.name][run.start : run.stop] for run in runs])


@settings(max_examples=150, deadline=None)
@given(entry=entries(), rows_per_block=st.integers(1, 9))
def test_runs_are_the_transform_and_its_inverse(entry, rows_per_block):
    parts = [torch.randn(shape) for shape in entry.hf_shapes]
    ours = entry.transform.to_ours(parts)
    theirs = dict(zip(entry.hf, parts, strict=True))
    assert torch.equal(gathered(rows_of_ours(entry), theirs), ours)
    for name, part in theirs.items():
        assert torch.equal(gathered(rows_of_hf(entry, name), {"ours": ours}), part)
    blocks = list(in_blocks(rows_of_ours(entry), rows_per_block=rows_per_block))
    assert [sum(run.num_rows for run in block) for block in blocks[:-1]] == [rows_per_block] * (
        len(blocks) - 1
    )
    assert torch.equal(torch.cat([gathered(block, theirs) for block in blocks]), ours)


def test_the_example_of_the_docstring():
    transform = GroupHeads(num_heads=4, num_kv_heads=2, head_dim=1, is_fused=False)
    entry = Entry(hf=("q", "k", "v"), ours="qkv", hf_shapes=((4, 1), (2, 1), (2, 1)), transform=transform)
    q, k, v = "q", "k", "v"
    wanted = [
        RowRun(q, 0, 2),
        RowRun(k, 0, 1),
        RowRun(v, 0, 1),
        RowRun(q, 2, 4),
        RowRun(k, 1, 2),
        RowRun(v, 1, 2),
    ]
    assert rows_of_ours(entry) == wanted
    assert rows_of_hf(entry, "k") == [RowRun("qkv", 2, 3), RowRun("qkv", 6, 7)]
