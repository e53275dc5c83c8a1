"""Sliding windows and sinks over context and tensor parallel ranks, against the plain formula in float64 on one.

Forward, every gradient (the sink's summed over context parallel ranks, as of any replicated parameter), every exchange,
documents cut over all ranks and held by some, generation in chunks and token by token. Tolerances: float64 1e-12, only
the order of sums differs; float32 1e-5 and bfloat16 6e-2, rounding of outputs and gradients of size 1 to 8.
"""

import numpy as np
import pytest
import torch

from tests.support.spawn import run_ranks
from tests.support.windowed import draw, errors, reference, windowed_attention

pytestmark = pytest.mark.distributed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}
LENGTHS = (16, 8, 40, 8, 24)  # zigzag chunks of 1 to 10 tokens over 2 and 4 ranks
WINDOWS = (None, 1, 2, 3, 8, 11, 100)
HELD = {
    2: ((0, 1), (1,), (0, 1), (0,), (1,)),
    4: ((0, 2), (3,), (0, 1, 2, 3), (1,), (1, 3)),
}


def cases_of(world_size):
    """(exchange, window, dtype, has a sink)."""
    cases = [
        (comm, window, torch.float64, True)
        for comm in ("p2p", "all_gather", "a2a", "by_document")
        for window in WINDOWS
    ]
    cases += [(comm, 8, torch.float64, False) for comm in ("p2p", "a2a", "by_document")]
    return cases + [(comm, 8, dtype, True) for comm in ("p2p", "by_document") for dtype in TOLERANCE]


def attend_and_return(rank, world_size, cases, device="cpu"):
    """Errors of output, dq, dk, dv on this rank's rows, and of the sink's gradient summed over the ranks."""
    import torch.distributed as dist

    from megatron_v2pe.parallel.attention.context_parallel import (
        context_parallel_attention,
        document_attention,
    )
    from megatron_v2pe.parallel.attention.transports.direct import Places
    from megatron_v2pe.parallel.shards import held_by
    from megatron_v2pe.parallel.zigzag import range_indices, shard_indices

    heads = dict(heads=8, key_heads=4)
    boundaries = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    found = {}
    for comm, window, dtype, has_sink in cases:
        holders = HELD.get(world_size)
        index = torch.from_numpy(
            range_indices(held_by(boundaries, holders, cp=world_size).ranges[rank])
            if comm == "by_document"
            else shard_indices(boundaries, cp=world_size, cp_rank=rank)
        )
        (*whole, sink), grad = draw(LENGTHS, dtype=dtype, has_sink=has_sink, **heads)
        leaves = [x[index].to(device).requires_grad_() for x in whole]
        if has_sink:
            sink = sink.to(device).requires_grad_()
            leaves.append(sink)
        rule = dict(scale=8**-0.5, window=window, sink=sink, group=dist.group.WORLD)
        if comm == "by_document":
            out = document_attention(*leaves[:3], places=Places(LENGTHS, holders), **rule)
        else:
            lengths = [length // world_size for length in LENGTHS]
            out = context_parallel_attention(comm)(*leaves[:3], lengths=lengths, **rule)
        ours = [out.detach(), *torch.autograd.grad(out, leaves, grad[index].to(device))]
        wanted = reference(LENGTHS, window=window, dtype=dtype, has_sink=has_sink, **heads)
        result = errors([x.cpu() for x in ours[:4]], [x[index] for x in wanted[:4]])
        if has_sink:
            total = ours[4].double()
            dist.all_reduce(total)
            result += errors([total.cpu()], wanted[4:])
        found[comm, window, dtype, has_sink] = result
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_equal_the_formula(world_size):
    for rank, found in enumerate(run_ranks(attend_and_return, world_size, cases_of(world_size), timeout=240)):
        wrong = {case: each for case, each in found.items() if not max(each) < TOLERANCE[case[2]]}
        assert wrong == {}, f"rank {rank}: out, dq, dk, dv, ds"


TOKENS = 60


def generated(rank, world_size, windows):
    """Every token's output by layers of these windows: three chunks, three new tokens, another chunk, two more."""
    import torch.distributed as dist

    from megatron_v2pe.inference.cache.kv_cache import KVCache, KVPlace, token_step
    from megatron_v2pe.inference.chunks import plan_chunks
    from megatron_v2pe.parallel.attention import cached
    from tests.support.packs import sample

    (query, key, value, sink), _ = draw((TOKENS,), has_sink=True)
    cache = KVCache(KVPlace(cp=world_size, cp_rank=rank, group=dist.group.WORLD))
    outs = {window: torch.zeros(TOKENS, 32, dtype=torch.float64) for window in windows}

    def layers(step, held):
        rows = held.clip(max=TOKENS - 1)
        return {
            window: cached.cached_attention(
                *(x[rows] for x in (query, key, value)),
                step=step,
                layer_number=number,
                scale=8**-0.5,
                window=window,
                sink=sink,
            )
            for number, window in enumerate(windows)
        }

    from megatron_v2pe.parallel.zigzag import shard_indices

    def prefill(start, stop):
        chunks = plan_chunks(sample([stop]), chunk_tokens=16, cp=world_size, start=start)
        cache.reserve(chunks, 8)
        for chunk in chunks:
            cut = shard_indices(np.array([0, chunk.padded]), cp=world_size, cp_rank=rank) + chunk.start
            step = cache.note_chunk(chunk)
            for window, out in layers(step, torch.from_numpy(cut)).items():
                outs[window][cut[: step.kept]] = out[: step.kept]

    def decode(start, stop):
        for token in range(start, stop):
            for window, out in layers(token_step([cache]), torch.tensor([token])).items():
                outs[window][token] = out[0] / world_size  # each rank has it; they are summed below

    prefill(0, 41)
    decode(41, 44)
    prefill(44, 58)
    decode(58, 60)
    for out in outs.values():
        dist.all_reduce(out)
    return outs


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_chunks_and_new_tokens_equal_one_pass(world_size):
    leaves, _ = draw((TOKENS,), has_sink=True)
    for found in run_ranks(generated, world_size, WINDOWS, timeout=120):
        for window, out in found.items():
            expected = windowed_attention(*leaves, (TOKENS,), window=window).flatten(1)
            assert float((out - expected).abs().max()) < 1e-12, window


def sent_bytes(rank, world_size, lengths):
    """Rows that a layer's windows bring to this rank, by length of the one document."""
    from megatron_v2pe.parallel.attention.transports.halo import zigzag_halo

    device = torch.device("cpu")
    return [
        len(zigzag_halo((n // world_size,), cp=world_size, rank=rank, window=8, device=device).order)
        for n in lengths
    ]


def test_what_travels_does_not_grow_with_the_document():
    rows = [sent_bytes(rank, 4, (64, 4096)) for rank in range(4)]
    assert rows == [[7, 7]] + [[14, 14]] * 3


def saved_and_computed(rank, world_size):
    """The checkpoint entry of this tensor parallel rank, and its heads' output and sink gradient."""
    import types

    import torch.distributed as dist
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_v2pe.parallel.attention.native import NativeContextAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=4,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float64,
        softmax_type="learnable",
        window_size=(10, 0),
    )
    ones = [dist.new_group([each]) for each in range(world_size)]
    groups = types.SimpleNamespace(tp=dist.group.WORLD, cp=ones[rank])
    layer = NativeContextAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    (*whole, sink), grad = draw(LENGTHS, has_sink=True, heads=8, key_heads=4)
    layer.softmax_offset.data.copy_(sink.chunk(world_size)[rank])
    entries = layer.sharded_state_dict("core_attention.", (), {"dp_cp_group": ones[rank]})
    (entry,) = entries.values()
    cut = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cut, cu_seqlens_kv=cut)
    mine = [x.chunk(world_size, dim=1)[rank] for x in (*whole, grad)]
    out = layer(*mine[:3], packed_seq_params=params)
    out.backward(mine[3].flatten(1))
    key = (list(entries), entry.global_shape, entry.global_offset, entry.data is layer.softmax_offset)
    return key, out.detach().unflatten(1, (-1, 8)), layer.softmax_offset.grad


def test_tensor_parallel_ranks_hold_the_sinks_of_their_heads():
    wanted = reference(LENGTHS, window=11, has_sink=True, heads=8, key_heads=4)
    found = run_ranks(saved_and_computed, 2, timeout=120)
    for rank, (key, _, _) in enumerate(found):
        assert key == (["core_attention.softmax_offset"], (8,), (4 * rank,), True)
    ours = [torch.cat([out for _, out, _ in found], dim=1), torch.cat([ds for *_, ds in found])]
    assert max(errors(ours, [wanted[0], wanted[4]])) < 1e-12
