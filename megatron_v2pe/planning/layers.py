"""The operations of a decoder layer, a tower layer and the projector, as tapes: what each allocates and keeps.

Read beside `models/` and mcore's attention.py and mlp.py: an operation here is a line there. Two things differ
between back ends:

    norm        fused (Transformer Engine, LayerNorm) keeps its input; torch's RMSNorm keeps a float32 copy of it
                (half precision) and the normalised rows
    attention   see `attention_bytes`

Shape legend: l tokens of this rank after the context parallel cut, r rows between layers (l, or l / tp with sequence
parallelism), t = tiles * (patches + 1) rows of the tower, H, C hidden sizes, q, k query and key channels of this rank,
F feed-forward channels of this rank. Sizes of tensors are bytes, e of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.tape import INPUT, Op

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What the modules of a back end allocate.

    Attributes:
        element_bytes: of the compute dtype.
        fused_norm: RMSNorm keeps its input and statistics only.
        float_attention: attention computes in float32 whatever the dtype is (torch's kernels on a CPU).
        expands_keys: key gradients are formed for every query head and then summed (grouped heads on the CPU).
        is_trained: linears keep their inputs for the gradients of their weights.
    """

    element_bytes: int
    fused_norm: bool
    float_attention: bool
    expands_keys: bool
    is_trained: bool = True


@dataclass(frozen=True, kw_only=True)
class AttentionBytes:
    """What an attention core allocates within a call, and keeps beside its inputs and output.

    Attributes:
        kept_bytes: statistics and copies held until backward.
        forward_bytes: for a moment in forward.
        backward_bytes: for a moment in backward, the returned gradients not counted.
        keeps_inputs: queries, keys and values are kept as they were given; false where they are kept in another form.
    """

    kept_bytes: float
    forward_bytes: float
    backward_bytes: float
    keeps_inputs: bool = True


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
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
    mlp_chunks: int
    """Pieces of a recomputed MLP; 0 keeps its activations."""


@dataclass(frozen=True, kw_only=True)
class TowerSizes:
    """A layer of the vision tower on one rank; `width` is the channels of its heads."""

    rows: int
    hidden: int
    width: int
    ffn: int
    rms_norm: bool
    qk_normalization: bool
    qkv_bias: bool
    drops_paths: bool
    mlp_chunks: int
    """1 recomputes the MLP, 0 keeps its activations."""


def norm_ops(name: str, source: str, size: float, kernels: Kernels, *, rms: bool = True) -> list[Op]:
    """A norm: output `size` bytes.

    Fused: keeps its input. torch's RMSNorm: y = (x float32 * rsqrt(mean x^2)) in the dtype, times the weight; keeps
    x as float32 (in half precision a copy) and y before the weight.
    """
    if kernels.fused_norm or not rms:
        return [Op(name=name, inputs=(source,), output_bytes=size, keeps=(source,))]
    whole = size * FLOAT_BYTES / kernels.element_bytes
    ops, read = [], source
    if kernels.element_bytes < FLOAT_BYTES:
        read = f"{name} float32"
        ops.append(Op(name=read, inputs=(source,), output_bytes=whole))
    hat = f"{name} normalised"
    kept_hat = (hat,) if kernels.is_trained else ()
    return [
        *ops,
        Op(
            name=hat,
            inputs=(read,),
            output_bytes=size,
            keeps=(read,),
            forward_bytes=whole,
            backward_bytes=(2 if kernels.element_bytes == FLOAT_BYTES else 3) * whole,
        ),
        Op(name=name, inputs=(hat,), output_bytes=size, keeps=kept_hat, backward_bytes=size),
    ]


def linear_op(
    name: str,
    source: str,
    *,
    output_bytes: float,
    weight_bytes: float,
    kernels: Kernels,
    adds_bias: bool = False,
    forward_bytes: float = 0.0,
    backward_bytes: float = 0.0,
) -> Op:
    """A linear: keeps its input for the weight's gradient, which exists for a moment in the compute dtype.

    A bias is added out of place. A frozen linear keeps nothing and forms no weight gradient.
    """
    return Op(
        name=name,
        inputs=(source,),
        output_bytes=output_bytes,
        keeps=(source,) if kernels.is_trained else (),
        forward_bytes=forward_bytes + (output_bytes if adds_bias else 0.0),
        backward_bytes=backward_bytes + (weight_bytes if kernels.is_trained else 0.0),
        is_matrix=True,
    )


def rotation_bytes(width_bytes: float, element_bytes: int) -> float:
    """Beyond the output, while queries or keys are turned in float32.

    Half products (0.5 each) of both halves: one finished half, two products and their sum make 2 of the output's
    float32 size, the output itself included; half precision adds the float32 copy of the input.
    """
    in_float = width_bytes * FLOAT_BYTES / element_bytes
    return in_float if element_bytes == FLOAT_BYTES else 3 * in_float - width_bytes


def attention_ops(sizes: DecoderSizes, attention: AttentionBytes, kernels: Kernels) -> list[Op]:
    """norm -> qkv -> rotate -> attend -> project -> add."""
    e = kernels.element_bytes
    hidden, query = sizes.rows * sizes.hidden * e, sizes.tokens * sizes.query_width * e
    key, mixed = (
        sizes.tokens * sizes.key_width * e,
        sizes.tokens * (sizes.query_width + 2 * sizes.key_width) * e,
    )
    whole = sizes.tokens * sizes.hidden * e if sizes.sequence_parallel else 0.0
    given = ("rotated query", "rotated key", "heads")
    ops = norm_ops("attention norm", INPUT, hidden, kernels)
    ops += [
        linear_op(
            "qkv",
            "attention norm",
            output_bytes=mixed,
            weight_bytes=sizes.hidden * (sizes.query_width + 2 * sizes.key_width) * e,
            kernels=kernels,
            adds_bias=sizes.qkv_bias,
            forward_bytes=whole,
            backward_bytes=2 * whole,
        ),
        Op(name="heads", inputs=("qkv",), view_of="qkv", output_bytes=mixed),
        # Queries lie between keys and values in the output of qkv, so splitting them off copies them.
        Op(
            name="query", inputs=("heads",), output_bytes=query, gradient_bytes=(query,), passes_gradient=True
        ),
        Op(
            name="rotated query",
            inputs=("query",),
            output_bytes=query,
            forward_bytes=rotation_bytes(query, e),
            backward_bytes=rotation_bytes(query, e),
        ),
        Op(
            name="rotated key",
            inputs=("heads",),
            output_bytes=key,
            forward_bytes=rotation_bytes(key, e),
            backward_bytes=rotation_bytes(key, e),
            gradient_bytes=(key,),
        ),
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
            output_bytes=hidden,
            weight_bytes=sizes.query_width * sizes.hidden * e,
            kernels=kernels,
            forward_bytes=whole,
            backward_bytes=whole,
        ),
        Op(name="middle", inputs=(INPUT, "projected"), output_bytes=hidden, passes_gradient=True),
    ]
    return ops


def gated_mlp_ops(source: str, sizes: DecoderSizes, kernels: Kernels, *, tokens: int) -> list[Op]:
    """fc1 -> silu(first half) * second half -> fc2, on `tokens` tokens.

    mcore adds an offset of 0 to the second half, out of place, so that besides fc1's output (2F) the two factors
    (F each) and their product (F) are kept: 5F.
    """
    e = kernels.element_bytes
    inner = tokens * sizes.ffn * e
    rows = tokens // sizes.tp if sizes.sequence_parallel else tokens
    whole = tokens * sizes.hidden * e if sizes.sequence_parallel else 0.0
    return [
        linear_op(
            "fc1",
            source,
            output_bytes=2 * inner,
            weight_bytes=2 * sizes.ffn * sizes.hidden * e,
            kernels=kernels,
            forward_bytes=whole,
            backward_bytes=2 * whole,
        ),
        Op(name="halves", inputs=("fc1",), view_of="fc1", output_bytes=2 * inner),
        Op(name="gate", inputs=("halves",), output_bytes=inner, keeps=("halves",), gradient_bytes=(inner,)),
        Op(name="up", inputs=("halves",), output_bytes=inner, gradient_bytes=(inner,), passes_gradient=True),
        Op(name="gated", inputs=("gate", "up"), output_bytes=inner, keeps=("gate", "up")),
        linear_op(
            "fc2",
            "gated",
            output_bytes=rows * sizes.hidden * e,
            weight_bytes=sizes.ffn * sizes.hidden * e,
            kernels=kernels,
            forward_bytes=whole,
            backward_bytes=whole,
        ),
    ]


def tower_mlp_ops(source: str, sizes: TowerSizes, kernels: Kernels, *, rows: int) -> list[Op]:
    """fc1 -> bias -> gelu -> fc2 -> bias; biases are added out of place."""
    e = kernels.element_bytes
    inner, hidden = rows * sizes.ffn * e, rows * sizes.hidden * e
    weight = sizes.ffn * sizes.hidden * e
    return [
        linear_op("fc1", source, output_bytes=inner, weight_bytes=weight, kernels=kernels),
        Op(name="fc1 biased", inputs=("fc1",), output_bytes=inner, passes_gradient=True),
        Op(name="gelu", inputs=("fc1 biased",), output_bytes=inner, keeps=("fc1 biased",)),
        linear_op("fc2", "gelu", output_bytes=hidden, weight_bytes=weight, kernels=kernels),
        Op(name="fc2 biased", inputs=("fc2",), output_bytes=hidden, passes_gradient=True),
    ]


def scaled_ops(name: str, source: str, size: float, sizes: TowerSizes, kernels: Kernels) -> list[Op]:
    """LayerScale keeps what it scales; drop path keeps a number per tile."""
    kept = (source,) if kernels.is_trained else ()
    ops = [Op(name=f"{name} scaled", inputs=(source,), output_bytes=size, keeps=kept, backward_bytes=size)]
    if sizes.drops_paths:
        ops.append(Op(name=f"{name} dropped", inputs=(f"{name} scaled",), output_bytes=size))
    return ops


def tower_attention_ops(sizes: TowerSizes, attention: AttentionBytes, kernels: Kernels) -> list[Op]:
    """norm -> qkv -> (norms) -> attend -> project -> bias -> scale -> add."""
    e = kernels.element_bytes
    hidden, width = sizes.rows * sizes.hidden * e, sizes.rows * sizes.width * e
    ops = norm_ops("attention norm", INPUT, hidden, kernels, rms=sizes.rms_norm)
    ops += [
        linear_op(
            "qkv",
            "attention norm",
            output_bytes=3 * width,
            weight_bytes=3 * sizes.width * sizes.hidden * e,
            kernels=kernels,
            adds_bias=sizes.qkv_bias,
        ),
        Op(name="heads", inputs=("qkv",), view_of="qkv", output_bytes=3 * width),
    ]
    sides = []
    for side in ("query", "key"):
        if sizes.qk_normalization:
            ops.append(
                Op(
                    name=side,
                    inputs=("heads",),
                    output_bytes=width,
                    gradient_bytes=(width,),
                    passes_gradient=True,
                )
            )
            ops += norm_ops(f"{side} norm", side, width, kernels, rms=sizes.rms_norm)
            sides.append(f"{side} norm")
        else:
            sides.append("heads")
    ops += [
        Op(
            name="attended",
            inputs=(*sides, "heads"),
            output_bytes=width,
            keeps=(*sides, "heads", "attended") if attention.keeps_inputs else ("attended",),
            keeps_extra_bytes=attention.kept_bytes,
            forward_bytes=attention.forward_bytes,
            backward_bytes=attention.backward_bytes,
            gradient_bytes=(width, width, width),
            is_matrix=True,
        ),
        linear_op(
            "projected",
            "attended",
            output_bytes=hidden,
            weight_bytes=sizes.width * sizes.hidden * e,
            kernels=kernels,
            forward_bytes=width,  # tiles and tokens are swapped back
            backward_bytes=width,
        ),
        Op(name="projected biased", inputs=("projected",), output_bytes=hidden, passes_gradient=True),
        *scaled_ops("attention", "projected biased", hidden, sizes, kernels),
    ]
    ops.append(Op(name="middle", inputs=(INPUT, ops[-1].name), output_bytes=hidden, passes_gradient=True))
    return ops
