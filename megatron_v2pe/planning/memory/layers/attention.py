"""What an attention core allocates, by back end and by how context parallel ranks share a sequence.

    native   torch's costs, block by block (`parallel/attention`); a float32 running output where blocks are merged
    te       Transformer Engine; its p2p keeps the keys of all ranks and every step's output until the call ends,
             so its transient does not shrink with cp (read in its source, 2.11; not measured)

Shape legend: l local tokens, q, k query and key channels of this rank, h query heads of this rank; Q, K, S are the
bytes of [l, q], [l, k] and [l, h] in float32, e the bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.layers.operations import FLOAT_BYTES, AttentionBytes, LayerCosts


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """A call of the decoder's attention on one rank.

    Attributes:
        tokens: l.
        longest_share: share of the pack that is computed in one call: the longest document, or all short ones together.
        gathers: documents are short, and their rows are gathered.
        query_width: q.
        key_width: k.
        num_heads: h.
        cp: ranks that share the sequence.
        comm_type: p2p, all_gather or a2a.
    """

    tokens: int
    longest_share: float
    gathers: bool
    query_width: int
    key_width: int
    num_heads: int
    cp: int
    comm_type: str


def native_attention_bytes(shape: AttentionShape, costs: LayerCosts) -> AttentionBytes:
    """torch's costs, block by block, merged by log-sum-exp.

    Forward, beside the output: float32 copies of q, k, v (half precision on a CPU), a block's output Q, and where
    blocks are merged (cp > 1) the float32 running output Q and a second block's worth while two are blended.

    Backward, beside the returned gradients: their float32 form Q + 2K (half precision); the block's dq and, for every
    query head, dk and dv: 3 Q; then dq in order Q and the sums over grouped heads 2K (without groups: dk, dv side by
    side 2K); float32 copies of q, k, v, output and gradient. Documents up to 512 tokens are gathered first.
    """
    query, key = (shape.tokens * width * FLOAT_BYTES for width in (shape.query_width, shape.key_width))
    statistics = shape.tokens * shape.num_heads * FLOAT_BYTES
    is_half, is_grouped = costs.element_bytes < FLOAT_BYTES, shape.query_width != shape.key_width
    unit = 1.0 if costs.float_attention else costs.element_bytes / FLOAT_BYTES  # of Q, in a block
    copies = is_half and costs.float_attention
    forward = unit * query + (query + 2 * key if copies else 0.0)
    per_head = query if costs.expands_keys else key
    backward = unit * (query + 2 * per_head + 2 * key + (query if is_grouped else 0.0))
    backward += 3 * query + 2 * key if copies else 0.0
    if shape.gathers:
        regrouped = 2 * query if is_grouped else 0.0
        forward += unit * (query + 2 * key + 2 * regrouped)
        backward += unit * (3 * query + 2 * key + 3 * regrouped)
    elif shape.longest_share < 1:
        backward += 2 * unit * query  # rows of the output and of its gradient
    merged = query + unit * query if shape.cp > 1 else 0.0
    whole = query + 2 * key if is_half else 0.0
    returned = whole * costs.element_bytes / FLOAT_BYTES
    travel = _visitors(shape, costs.element_bytes)
    return AttentionBytes(
        kept_bytes=statistics,
        forward_bytes=(forward + merged) * shape.longest_share + travel + statistics,
        backward_bytes=backward * shape.longest_share + whole - returned + 2 * travel + statistics,
    )


def _visitors(shape: AttentionShape, element_bytes: int) -> float:
    """Keys and values of other ranks in memory at a time, beside my own.

    p2p: the pair that is computed with and the pair that is under way, 2 [2, l, k]. all_gather: those of all ranks and
    my own copy.
    """
    if shape.cp == 1:
        return 0.0
    pair = 2 * shape.tokens * shape.key_width * element_bytes
    return (shape.cp + 1) * pair if shape.comm_type == "all_gather" else 2 * pair


def a2a_attention_bytes(shape: AttentionShape, inside: AttentionBytes, element_bytes: int) -> AttentionBytes:
    """a2a: q, k, v of fewer heads and all tokens are kept in place of the rank's own, and the output with them.

    The exchange holds what is sent, what arrives and what is put in order: 3 (q + 2k).
    """
    mixed = shape.tokens * (shape.query_width + 2 * shape.key_width) * element_bytes
    out = shape.tokens * shape.query_width * element_bytes
    return AttentionBytes(
        kept_bytes=inside.kept_bytes + mixed + out,
        forward_bytes=max(2 * mixed, inside.forward_bytes + out, 2 * out),
        backward_bytes=max(3 * mixed, inside.backward_bytes + mixed + out),
        keeps_inputs=False,
    )


def te_attention_bytes(shape: AttentionShape, costs: LayerCosts) -> AttentionBytes:
    """Transformer Engine on cuDNN or FlashAttention.

    One rank: forward nothing beside the output; backward a float32 sum of dq, Q. p2p: forward all cp pairs of keys and
    one output per step; backward two buffers of keys and of their gradients, and a step's dq, dk, dv.
    """
    e = costs.element_bytes
    query, key = (shape.tokens * width * e for width in (shape.query_width, shape.key_width))
    statistics = shape.tokens * shape.num_heads * FLOAT_BYTES
    accumulator = shape.tokens * shape.query_width * FLOAT_BYTES
    if shape.cp == 1 or shape.comm_type == "a2a":
        return AttentionBytes(kept_bytes=statistics, forward_bytes=statistics, backward_bytes=accumulator)
    return AttentionBytes(
        kept_bytes=shape.cp * statistics,
        forward_bytes=shape.cp * (2 * key + query),
        backward_bytes=2 * (4 * key) + query + 2 * key + accumulator,
    )


def decoder_attention_bytes(shape: AttentionShape, costs: LayerCosts, backend: str) -> AttentionBytes:
    """The decoder's attention for a back end, `native` or `transformer_engine`."""
    core = native_attention_bytes if backend == "native" else te_attention_bytes
    if shape.cp > 1 and shape.comm_type == "a2a":
        # cp times the tokens, 1 / cp of the heads: the same bytes, as on one rank.
        alone = AttentionShape(
            tokens=shape.tokens * shape.cp,
            longest_share=shape.longest_share,
            gathers=shape.gathers,
            query_width=shape.query_width // shape.cp,
            key_width=shape.key_width // shape.cp,
            num_heads=shape.num_heads // shape.cp,
            cp=1,
            comm_type="a2a",
        )
        return a2a_attention_bytes(shape, core(alone, costs), costs.element_bytes)
    return core(shape, costs)


def tower_attention_bytes(*, rows: int, width: int, num_heads: int, costs: LayerCosts) -> AttentionBytes:
    """Bidirectional attention tile by tile through torch's or Transformer Engine's fused kernel.

    On a CPU half precision is computed in float32 copies of q, k, v, which are kept with the float32 output.
    """
    statistics = rows * num_heads * FLOAT_BYTES
    whole = rows * width * FLOAT_BYTES
    if costs.float_attention and costs.element_bytes < FLOAT_BYTES:
        return AttentionBytes(
            kept_bytes=statistics + 4 * whole,
            forward_bytes=0.0,
            backward_bytes=3.5 * whole,
            keeps_inputs=False,
        )
    return AttentionBytes(kept_bytes=statistics, forward_bytes=0.0, backward_bytes=0.0)
