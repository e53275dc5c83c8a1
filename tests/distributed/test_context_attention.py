"""Attention over context parallel ranks (ring, all_gather, a2a) against full attention, forward and backward.

The same packed documents go through plain softmax attention in float64 on one process; each rank's shard must equal
its rows of that. Tolerances: float64 1e-12 (only the order of sums differs), float32 4e-6. Bytes that each rank sent
are counted by Linux and must be those of the back end's formula.
"""

import numpy as np
import pytest
import torch

from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed

SHORTEST = (4, 4, 8)  # 2 * cp tokens: zigzag chunks of one token at cp 2
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

    from megatron_v2pe.parallel.attention.context_parallel import context_parallel_attention
    from megatron_v2pe.parallel.zigzag import shard_indices

    cut = boundaries((sum(lengths),) if whole_row else lengths)
    index = torch.from_numpy(shard_indices(cut, cp=world_size, cp_rank=rank))
    local = [x[index] for x in inputs(lengths, heads, key_heads, dtype)]
    query, key, value = (x.requires_grad_() for x in local[:3])
    out = context_parallel_attention(comm)(
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
    """Name of each case -> errors of output, dq, dk, dv on this rank."""
    return {name: shard_errors(rank, world_size, *case) for name, case in cases.items()}


BACK_ENDS = ("p2p", "all_gather", "a2a")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# bfloat16: inputs are exact, the error is that of rounding outputs and gradients of size 1 to 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-2}


def name_of(comm, lengths, heads, key_heads, dtype):
    return f"{comm}, {'+'.join(map(str, lengths))} tokens, {heads} on {key_heads} heads, {str(dtype)[6:]}"


CASES = {
    name_of(comm, lengths, *heads, dtype): (comm, lengths, *heads, dtype, False)
    for comm in BACK_ENDS
    for lengths in (SHORTEST, MIXED, (64,))
    for heads in HEADS
    for dtype in DTYPES
    if comm != "a2a" or heads[1] % 2 == 0
}
WHOLE_ROW = {f"{comm}, whole row": (comm, MIXED, 4, 2, torch.float64, True) for comm in BACK_ENDS}


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(all_errors, 2, {**CASES, **WHOLE_ROW}, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_full_attention(two_ranks, name):
    tolerance = TOLERANCE[CASES[name][4]]
    for rank, errors in enumerate(two_ranks):
        assert max(errors[name]) < tolerance, f"rank {rank}: out, dq, dk, dv off by {errors[name]}"


@pytest.mark.parametrize("name", WHOLE_ROW)
def test_cutting_the_pack_as_one_row_gives_another_result(two_ranks, name):
    for errors in two_ranks:
        assert max(errors[name]) > 1e-2


@pytest.mark.slow
def test_four_ranks_equal_full_attention():
    cases = {
        name_of(comm, lengths, 8, 4, dtype): (comm, lengths, 8, 4, dtype, False)
        for comm in BACK_ENDS
        for lengths in ((8, 16, 8), (8, 40, 24))
        for dtype in (torch.float64, torch.float32)
    }
    for errors in run_ranks(all_errors, 4, cases, timeout=120):
        for name, found in errors.items():
            assert max(found) < TOLERANCE[cases[name][4]], name


HELD = {  # documents' lengths and the ranks that hold them, of 2 and of 4
    2: {
        "whole": ((12, 8, 20), ((0,), (1,), (0,))),
        "mixed": ((40, 4, 8, 8, 28), ((0, 1), (1,), (0,), (1,), (0, 1))),
        "cut": ((4, 4, 8), ((0, 1),) * 3),
        "nothing in common": ((600, 8), ((0,), (1,))),
    },
    4: {
        "subsets": ((16, 24, 8, 8, 32, 4), ((0, 2), (1, 2, 3), (3,), (0,), (0, 1, 2, 3), (1,))),
        "pairs": ((8, 8, 8, 8), ((0, 3), (1, 2), (2, 3), (0, 1))),
    },
}
HELD_DTYPES = (torch.float64, torch.float32)


def held_errors(rank, world_size):
    """Largest errors of output, dq, dk, dv where documents lie on some of the ranks."""
    import torch.distributed as dist

    from megatron_v2pe.parallel.attention.context_parallel import document_attention
    from megatron_v2pe.parallel.attention.transports.direct import Places
    from megatron_v2pe.parallel.shards import held_by
    from megatron_v2pe.parallel.zigzag import range_indices

    found = {}
    for name, (lengths, holders) in HELD[world_size].items():
        for dtype in HELD_DTYPES:
            index = torch.from_numpy(
                range_indices(held_by(boundaries(lengths), holders, cp=world_size).ranges[rank])
            )
            query, key, value, grad = (x[index] for x in inputs(lengths, 4, 2, dtype))
            leaves = [x.requires_grad_() for x in (query, key, value)]
            places = Places(lengths, holders)
            out = document_attention(
                *leaves, places=places, scale=query.shape[-1] ** -0.5, group=dist.group.WORLD
            )
            ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            wanted = reference(lengths, 4, 2, dtype)
            found[name, dtype] = [
                float((a.double() - b[index]).abs().max()) for a, b in zip(ours, wanted, strict=True)
            ]
    return found


def check_held(world_size):
    for errors in run_ranks(held_errors, world_size, timeout=120):
        for (name, dtype), found in errors.items():
            assert max(found) < TOLERANCE[dtype], (name, dtype, found)


def test_documents_on_some_of_two_ranks():
    check_held(2)


@pytest.mark.slow
def test_documents_on_some_of_four_ranks():
    check_held(4)


SENT_LENGTHS, SENT_HEADS, SENT_DIM = (256, 512, 64), 4, 32
SENT_TOLERANCE = 0.01  # headers of messages


def written_bytes():
    """Bytes that this process has written so far, sockets included, as Linux counts them."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(dict(line.split(": ") for line in file.read().splitlines())["wchar"])


def bytes_sent(rank, world_size, comms):
    import torch.distributed as dist

    from megatron_v2pe.parallel.attention.context_parallel import context_parallel_attention
    from megatron_v2pe.parallel.zigzag import shard_indices

    index = torch.from_numpy(shard_indices(boundaries(SENT_LENGTHS), cp=world_size, cp_rank=rank))
    *local, grad = (x[index] for x in inputs(SENT_LENGTHS, SENT_HEADS, SENT_HEADS, torch.float32, SENT_DIM))

    def work(comm):
        leaves = [x.detach().requires_grad_() for x in local]
        lengths = [length // world_size for length in SENT_LENGTHS]
        attend = context_parallel_attention(comm)
        attend(*leaves, lengths=lengths, scale=1.0, group=dist.group.WORLD).backward(grad)

    def counted(comm):
        dist.barrier()
        before = written_bytes()
        work(comm)
        sent = written_bytes() - before
        dist.barrier()
        return sent

    for comm in comms:  # gloo connects to each peer once
        work(comm)
    return {comm: counted(comm) for comm in comms}


def formula(comm, rank, cp):
    """Bytes of the back ends' docstrings, forward and backward; B = bytes of own keys and values."""
    own = 2 * sum(SENT_LENGTHS) / cp * SENT_HEADS * SENT_DIM * 4
    if comm == "a2a":  # queries and outputs are as large as keys and values
        return 2 * (cp - 1) / cp * 2 * own
    keys = (cp - 1) * own
    if comm == "p2p":  # rank 0 passes on the early zigzag chunks alone
        keys = (cp - 1) * own / 2 if rank == 0 else (cp - rank) * own + (rank - 1) * own / 2
    return 2 * keys + (cp - 1 - rank) * own + rank * own / 2


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_sent_are_the_formulas(world_size):
    for rank, sent in enumerate(run_ranks(bytes_sent, world_size, BACK_ENDS, timeout=120)):
        for comm, count in sent.items():
            wanted = formula(comm, rank, world_size)
            assert abs(count / wanted - 1) < SENT_TOLERANCE, f"{comm} rank {rank}: {count} of {wanted}"


SENT_BY_DOCUMENT = ((256, 512, 64, 128), ((0, 1), (1,), (0, 1), (0,)))


def bytes_sent_by_document(rank, world_size):
    """Bytes that this rank writes, and those of the rows that `direct` says it sends."""
    import torch.distributed as dist

    from megatron_v2pe.parallel.attention.context_parallel import document_attention
    from megatron_v2pe.parallel.attention.transports.direct import Places
    from megatron_v2pe.parallel.shards import local_lengths, rows_received

    lengths, holders = SENT_BY_DOCUMENT
    places = Places(lengths, holders)
    tokens = sum(local_lengths(lengths, holders, rank))
    *local, grad = inputs((tokens,), SENT_HEADS, SENT_HEADS, torch.float32, SENT_DIM)

    def work():
        leaves = [x.detach().requires_grad_() for x in local]
        document_attention(*leaves, places=places, scale=1.0, group=dist.group.WORLD).backward(grad)

    work()  # gloo connects once
    dist.barrier()
    before = written_bytes()
    work()
    sent = written_bytes() - before
    dist.barrier()
    received = [rows_received(lengths, holders, each) for each in range(world_size)]
    # Keys twice, to the one other rank; gradients of what was received.
    rows = 2 * received[1 - rank] + received[rank]
    return sent, rows * 2 * SENT_HEADS * SENT_DIM * 4


def test_bytes_sent_are_those_of_shared_documents():
    for sent, wanted in run_ranks(bytes_sent_by_document, 2, timeout=120):
        assert abs(sent / wanted - 1) < SENT_TOLERANCE, (sent, wanted)


def refusal(rank, world_size, heads, key_heads):
    import torch.distributed as dist

    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.parallel.attention.context_parallel import context_parallel_attention

    query, key, value, _ = inputs((8,), heads, key_heads, torch.float32)
    try:
        context_parallel_attention("a2a")(query, key, value, lengths=(8,), scale=1.0, group=dist.group.WORLD)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("heads", "what"), [((6, 3), "3 KV heads"), ((3, 2), "3 attention heads")])
def test_heads_that_do_not_divide_are_refused(heads, what):
    for message in run_ranks(refusal, 2, *heads):
        assert f"the {what} of a tensor parallel rank do not divide by parallel.cp = 2" in message
