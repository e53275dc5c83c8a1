"""Attention over context parallel ranks (ring, all_gather, a2a) against full attention, forward and backward.

Strategy: the same packed documents through plain softmax attention in float64 on one process; each rank's shard
must equal its rows of that. Strictness: float64 1e-12 (nothing but summation order differs), float32 4e-6. Bytes
that each rank sent are what the kernel counted, and must be the formula's.
"""

from functools import partial

import numpy as np
import pytest
import torch

from tests.support.spawn import run_ranks
from tools import bench_attention as bench

pytestmark = pytest.mark.distributed

SHORTEST = (4, 4, 8)  # 2 * cp tokens: chunks of one token at cp 2
MIXED = (12, 4, 40, 4, 28)
HEADS = [(4, 4), (4, 2), (6, 1)]


def boundaries(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def inputs(lengths, heads, key_heads, dtype, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return [
        torch.randn(total, count, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, key_heads, key_heads, heads)
    ]


def full_attention(query, key, value, lengths):
    """Plain formula over the whole pack with a mask of documents."""
    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    mask = (document[:, None] == document) & torch.ones(len(document), len(document), dtype=torch.bool).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hst,thd->shd", weights, value)


def reference(lengths, heads, key_heads, dtype):
    query, key, value, grad = (x.double() for x in inputs(lengths, heads, key_heads, dtype))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = full_attention(*leaves, lengths)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def shard_errors(rank, world_size, comm, lengths, heads, key_heads, dtype, whole_row):
    """Largest error of output and gradients of this rank's shard."""
    import torch.distributed as dist

    from megatron_v2pe.parallel.attention.context import context_attention
    from megatron_v2pe.parallel.zigzag import shard_indices

    cut = boundaries((sum(lengths),) if whole_row else lengths)
    index = torch.from_numpy(shard_indices(cut, cp=world_size, cp_rank=rank))
    local = [x[index] for x in inputs(lengths, heads, key_heads, dtype)]
    query, key, value = (x.requires_grad_() for x in local[:3])
    out = context_attention(comm)(
        query,
        key,
        value,
        lengths=[length // world_size for length in lengths],
        scale=query.shape[-1] ** -0.5,
        group=dist.group.WORLD,
    )
    assert out.dtype == dtype
    ours = [out.detach(), *torch.autograd.grad(out, (query, key, value), local[3])]
    wanted = reference(lengths, heads, key_heads, dtype)
    return [float((mine.double() - full[index]).abs().max()) for mine, full in zip(ours, wanted, strict=True)]


def all_errors(rank, world_size, cases):
    return [shard_errors(rank, world_size, *case) for case in cases]


BACK_ENDS = ("p2p", "all_gather", "a2a")
CASES = [
    (comm, lengths, *heads, dtype, False)
    for comm in BACK_ENDS
    for lengths in (SHORTEST, MIXED, (64,))
    for heads in HEADS
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if comm != "a2a" or heads[1] % 2 == 0
]
# bfloat16: inputs are exact, the error is that of rounding outputs and gradients of size 1 to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-2}


WHOLE_ROW = [(comm, MIXED, 4, 2, torch.float64, True) for comm in BACK_ENDS]


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(all_errors, 2, [*CASES, *WHOLE_ROW], timeout=120)


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: str(CASES[i][:5]).replace("torch.", ""))
def test_two_ranks_equal_full_attention(two_ranks, case):
    tolerance = TOLERANCE[CASES[case][4]]
    for rank, errors in enumerate(two_ranks):
        assert max(errors[case]) < tolerance, f"rank {rank}: out, dq, dk, dv off by {errors[case]}"


@pytest.mark.parametrize("case", range(-len(WHOLE_ROW), 0), ids=BACK_ENDS)
def test_cutting_the_pack_as_one_row_gives_another_result(two_ranks, case):
    for errors in two_ranks:
        assert max(errors[case]) > 1e-2


@pytest.mark.slow
def test_four_ranks_equal_full_attention():
    cases = [
        (comm, lengths, 8, 4, dtype, False)
        for comm in BACK_ENDS
        for lengths in ((8, 16, 8), (8, 40, 24))
        for dtype in (torch.float64, torch.float32)
    ]
    for errors in run_ranks(all_errors, 4, cases, timeout=120):
        for case, found in zip(cases, errors, strict=True):
            assert max(found) < TOLERANCE[case[4]], case


PROBLEM = bench.Problem(documents=(256, 512, 64), heads=4, kv_heads=4, head_dim=32, dtype=torch.float32)


def bytes_sent(rank, world_size, comms):
    import torch.distributed as dist

    tensors = PROBLEM.tensors(rank, world_size)

    def work(comm):
        bench.forward_and_backward(PROBLEM, tensors, comm=comm, cp=world_size, group=dist.group.WORLD)

    for comm in comms:  # gloo greets each peer once
        work(comm)
    return [bench.counted(partial(work, comm)).sent for comm in comms]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_sent_are_the_formulas(world_size):
    for rank, sent in enumerate(run_ranks(bytes_sent, world_size, BACK_ENDS, timeout=120)):
        for comm, count in zip(BACK_ENDS, sent, strict=True):
            wanted = bench.formula(PROBLEM, comm=comm, rank=rank, cp=world_size)
            assert abs(count / wanted - 1) < bench.TARGET_BYTES, f"{comm} rank {rank}: {count} of {wanted}"


def refusal(rank, world_size, heads, key_heads):
    import torch.distributed as dist

    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.parallel.attention.context import context_attention

    query, key, value, _ = inputs((8,), heads, key_heads, torch.float32)
    try:
        context_attention("a2a")(query, key, value, lengths=(8,), scale=1.0, group=dist.group.WORLD)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("heads", "what"), [((6, 3), "3 KV heads"), ((3, 2), "3 attention heads")])
def test_heads_that_cannot_be_dealt_are_refused(heads, what):
    for message in run_ranks(refusal, 2, *heads):
        assert f"the {what} of a tensor parallel rank do not divide by parallel.cp = 2" in message
