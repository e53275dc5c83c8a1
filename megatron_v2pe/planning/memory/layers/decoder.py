"""A decoder layer as a tape of operations: norm, attention, norm, gated MLP, two additions.

Layers with a window count as layers without: what they keep is the same.

Shape legend: l tokens of this rank after the context parallel cut, r rows between layers (l, or l / tp with sequence
parallelism), H hidden, q, k query and key channels of this rank, F feed-forward channels of this rank. Sizes of tensors
are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_v2pe.planning.memory.layers.attention import AttentionShape, decoder_attention_bytes
from megatron_v2pe.planning.memory.layers.operations import (
    FLOAT_BYTES,
    AttentionBytes,
    LayerCosts,
    linear_op,
    norm_ops,
)
from megatron_v2pe.planning.memory.layers.stack import recomputed_mlp_op
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder layer on one rank."""

    tokens: int
    rows: int
    hidden: int
    query_width: int
    key_width: int
    ffn: int
    num_heads: int
    head_dim: int
    qkv_bias: bool
    tp: int
    sequence_parallel: bool
    fused_swiglu: bool
    mlp_chunks: int
    """Slices of rows of a recomputed MLP; 0 keeps its activations."""
    routed_rows: int = 0
    """Rows that this rank's experts get; 0 for a layer with one MLP."""
    expert_ffn: int = 0
    """Channels of an expert on this rank."""
    num_experts: int = 0
    """Of the whole layer."""
    local_experts: int = 1
    """Of this rank."""
    clamped: bool = False
    """Experts of GPT-OSS, and a bias of the output projection."""

    @property
    def mixed_width(self) -> int:
        """Output channels of qkv."""
        return self.query_width + 2 * self.key_width


def rotation_bytes(width_bytes: float, element_bytes: int) -> float:
    """Beyond the output, while queries or keys are rotated in float32.

    The halves are exchanged into what becomes the output; half precision makes a float32 copy of the input, and
    rotates in a float32 tensor.
    """
    in_float = width_bytes * FLOAT_BYTES / element_bytes
    return 0.0 if element_bytes == FLOAT_BYTES else 2 * in_float


def rotation_op(name: str, source: str, size: float, element_bytes: int) -> Op:
    """Rotary angles on queries or keys of `size` bytes; keeps the angles, which all layers share."""
    extra = rotation_bytes(size, element_bytes)
    return Op(
        name=name,
        inputs=(source,),
        output_bytes=size,
        forward_bytes=extra,
        backward_bytes=extra,
        gradient_bytes=(size,),
    )


def decoder_attention_ops(sizes: DecoderShape, attention: AttentionBytes, costs: LayerCosts) -> list[Op]:
    """norm -> qkv -> rotate -> attend -> project -> add.

    With sequence parallelism the gathered rows of qkv and fc1 lie in one buffer that mcore keeps for the whole run;
    what comes back (row linears, and column linears' gradients) exists whole for a moment.
    """
    e = costs.element_bytes
    hidden = sizes.rows * sizes.hidden * e
    query = sizes.tokens * sizes.query_width * e
    key = sizes.tokens * sizes.key_width * e
    mixed = sizes.tokens * sizes.mixed_width * e
    whole = sizes.tokens * sizes.hidden * e if sizes.sequence_parallel else 0.0
    given = ("rotated query", "rotated key", "heads")
    return [
        *norm_ops("attention norm", INPUT, hidden, costs),
        linear_op(
            "qkv",
            "attention norm",
            role="linear_qkv",
            input_bytes=hidden,
            output_bytes=mixed,
            weight_bytes=sizes.hidden * sizes.mixed_width * e,
            costs=costs,
            adds_bias=sizes.qkv_bias,
            backward_bytes=whole,
        ),
        Op(name="heads", inputs=("qkv",), view_of="qkv", output_bytes=mixed),
        # Queries lie between keys and values in the output of qkv, so splitting them off copies them.
        Op(
            name="query", inputs=("heads",), output_bytes=query, gradient_bytes=(query,), passes_gradient=True
        ),
        rotation_op("rotated query", "query", query, e),
        rotation_op("rotated key", "heads", key, e),
        Op(
            name="attended",
            inputs=given,
            output_bytes=query,
            keeps=(*given, "attended") if attention.keeps_inputs else ("attended",),
            keeps_extra_bytes=attention.kept_bytes,
            forward_bytes=attention.forward_bytes,
            backward_bytes=attention.backward_bytes,
            gradient_bytes=(query, key, key),
            is_matrix=True,
        ),
        linear_op(
            "projected",
            "attended",
            role="linear_proj",
            input_bytes=query,
            output_bytes=hidden,
            weight_bytes=sizes.query_width * sizes.hidden * e,
            costs=costs,
            forward_bytes=whole,
            backward_bytes=whole,
        ),
        *proj_bias_ops(hidden, sizes),
        Op(name="middle", inputs=(INPUT, _projected(sizes)), output_bytes=hidden, passes_gradient=True),
    ]


def _projected(sizes: DecoderShape) -> str:
    return "projected biased" if sizes.clamped else "projected"


def proj_bias_ops(hidden: float, sizes: DecoderShape) -> list[Op]:
    """The bias of the output projection, which is added out of place; none in most families."""
    if not sizes.clamped:
        return []
    name = _projected(sizes)
    return [Op(name=name, inputs=("projected",), output_bytes=hidden, passes_gradient=True)]


def gated_mlp_ops(source: str, sizes: DecoderShape, costs: LayerCosts, *, tokens: int) -> list[Op]:
    """fc1 -> silu(first half) * second half -> fc2, on `tokens` tokens.

    Kept are fc1's output (2F) and the product (F): 3F. Where it is not fused, silu(first half) is kept as well: 4F.
    Experts, which are mcore's, also keep a copy of the second half, to which it adds an offset of 0: 5F.
    """
    e = costs.element_bytes
    inner = tokens * sizes.ffn * e
    rows = tokens // sizes.tp if sizes.sequence_parallel else tokens
    whole = tokens * sizes.hidden * e if sizes.sequence_parallel else 0.0
    return [
        linear_op(
            "fc1",
            source,
            role="linear_fc1",
            input_bytes=rows * sizes.hidden * e,
            output_bytes=2 * inner,
            weight_bytes=2 * sizes.ffn * sizes.hidden * e,
            costs=costs,
            backward_bytes=whole,
        ),
        *gated_ops(inner, sizes, costs),
        linear_op(
            "fc2",
            "gated",
            role="linear_fc2",
            input_bytes=inner,
            output_bytes=rows * sizes.hidden * e,
            weight_bytes=sizes.ffn * sizes.hidden * e,
            costs=costs,
            forward_bytes=whole,
            backward_bytes=whole,
        ),
    ]


def gated_ops(inner: float, sizes: DecoderShape, costs: LayerCosts) -> list[Op]:
    """silu(first half) * second half of fc1's output, `inner` bytes each.

    Fused on a CPU, where nothing is compiled: silu(first half) for a moment in forward, in backward up to four
    intermediates and both halves of the gradient before they are joined.
    """
    if sizes.fused_swiglu or not sizes.num_experts:
        eager = sizes.fused_swiglu and costs.float_attention  # fused, on a CPU
        plain = not sizes.fused_swiglu
        return [
            Op(
                name="gated",
                inputs=("fc1",),
                output_bytes=inner,
                keeps=("fc1",),
                keeps_extra_bytes=inner if plain else 0.0,  # silu(first half)
                forward_bytes=inner if eager else 0.0,
                backward_bytes=3 * inner if eager else inner if plain else 0.0,
            )
        ]
    return [
        Op(name="halves", inputs=("fc1",), view_of="fc1", output_bytes=2 * inner),
        Op(name="gate", inputs=("halves",), output_bytes=inner, keeps=("halves",), gradient_bytes=(inner,)),
        Op(name="up", inputs=("halves",), output_bytes=inner, gradient_bytes=(inner,), passes_gradient=True),
        Op(name="gated", inputs=("gate", "up"), output_bytes=inner, keeps=("gate", "up")),
    ]


def experts_ops(source: str, sizes: DecoderShape, costs: LayerCosts) -> list[Op]:
    """Router in float32 -> rows by expert -> all-to-all -> by local expert -> gated MLPs -> back -> weighted sum.

    Every step from `permuted` to `returned` has all routed rows n; the router keeps weights and choice, [r, E] each.
    """
    e, n = costs.element_bytes, sizes.routed_rows
    hidden, routed = sizes.rows * sizes.hidden * e, n * sizes.hidden * e
    logits = sizes.rows * sizes.num_experts * FLOAT_BYTES
    router = Op(
        name="router",
        inputs=(source,),
        output_bytes=logits,
        keeps=(source, "router"),
        keeps_extra_bytes=logits + sizes.rows * sizes.num_experts,
        forward_bytes=sizes.rows * sizes.hidden * FLOAT_BYTES,
        backward_bytes=sizes.rows * sizes.hidden * FLOAT_BYTES,
        gradient_bytes=(hidden,),
        is_matrix=True,
    )
    steps = (
        ("permuted", source, hidden),
        ("dispatched", "permuted", routed),
        ("sorted", "dispatched", routed),
    )
    moved = [
        Op(name=name, inputs=(before,), output_bytes=routed, gradient_bytes=(size,))
        for name, before, size in steps
    ]
    inner = replace(sizes, ffn=sizes.expert_ffn, tp=1, sequence_parallel=False)
    mlp = gated_mlp_ops("sorted", inner, replace(costs, adapters=()), tokens=n)
    if sizes.clamped:
        mlp = clamped_ops(mlp, sizes, costs)
    back = [
        Op(name=name, inputs=(before,), output_bytes=routed, gradient_bytes=(routed,))
        for name, before in (("unsorted", mlp[-1].name), ("returned", "unsorted"))
    ]
    combined = Op(
        name="combined", inputs=("returned", "router"), output_bytes=hidden, gradient_bytes=(routed, logits)
    )
    return [router, *moved, *mlp, *back, combined]


def clamped_ops(mlp: list[Op], sizes: DecoderShape, costs: LayerCosts) -> list[Op]:
    """GPT-OSS: the activation keeps fc1's output alone; outputs of the experts are joined, then weighted.

    What the activation needs for a moment is of one expert's rows, in float32: both halves and their products, five
    times F, and in backward as much again. Gradients of an expert's weights exist one by one before they are stacked.
    """
    n, e = sizes.routed_rows, costs.element_bytes
    inner, routed = n * sizes.expert_ffn * e, n * sizes.hidden * e
    moment = 5 * n / sizes.local_experts * sizes.expert_ffn * FLOAT_BYTES
    first, second = mlp[0], mlp[-1]
    activation = Op(
        name="gated",
        inputs=("fc1",),
        output_bytes=inner,
        keeps=("fc1",),
        forward_bytes=moment,
        backward_bytes=2 * moment,
    )
    weighted = Op(
        name="weighted", inputs=("fc2",), output_bytes=routed, keeps=("fc2",), gradient_bytes=(routed,)
    )
    joined = replace(second, forward_bytes=second.forward_bytes + routed)
    return [first, activation, joined, weighted]


def decoder_layer_ops(
    sizes: DecoderShape, shape: AttentionShape, *, backend: str, costs: LayerCosts
) -> list[Op]:
    """A whole decoder layer."""
    hidden = sizes.rows * sizes.hidden * costs.element_bytes
    ops = decoder_attention_ops(sizes, decoder_attention_bytes(shape, costs, backend), costs)
    ops += norm_ops("mlp norm", "middle", hidden, costs)
    if sizes.routed_rows and sizes.mlp_chunks:
        experts = experts_ops(INPUT, sizes, costs)
        ops.append(
            recomputed_mlp_op(
                "mlp", "mlp norm", experts, input_bytes=hidden, output_bytes=hidden, mlp_chunks=1
            )
        )
    elif sizes.routed_rows:
        ops += experts_ops("mlp norm", sizes, costs)
    elif sizes.mlp_chunks:
        mlp = gated_mlp_ops(INPUT, sizes, costs, tokens=sizes.tokens // sizes.mlp_chunks)
        ops.append(
            recomputed_mlp_op(
                "mlp",
                "mlp norm",
                mlp,
                input_bytes=hidden,
                output_bytes=hidden,
                mlp_chunks=sizes.mlp_chunks,
            )
        )
    else:
        ops += gated_mlp_ops("mlp norm", sizes, costs, tokens=sizes.tokens)
    return [
        *ops,
        Op(name="output", inputs=("middle", ops[-1].name), output_bytes=hidden, passes_gradient=True),
    ]
