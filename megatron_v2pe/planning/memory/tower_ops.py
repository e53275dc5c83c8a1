"""The operations of a layer of the vision tower, as a tape: what `models/vision.py` adds to mcore's layer.

Shape legend: t = tiles * (patches + 1) rows, C channels, F feed-forward channels of this rank. Sizes of tensors are
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.layers import AttentionBytes, LayerCosts, linear_op, norm_ops
from megatron_v2pe.planning.memory.tape import INPUT, Op


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


def tower_mlp_ops(source: str, sizes: TowerSizes, costs: LayerCosts, *, rows: int) -> list[Op]:
    """fc1 -> bias -> gelu -> fc2 -> bias; biases are added out of place."""
    e = costs.element_bytes
    inner, hidden = rows * sizes.ffn * e, rows * sizes.hidden * e
    weight = sizes.ffn * sizes.hidden * e
    return [
        linear_op(
            "fc1",
            source,
            role="linear_fc1",
            input_bytes=hidden,
            output_bytes=inner,
            weight_bytes=weight,
            costs=costs,
        ),
        Op(name="fc1 biased", inputs=("fc1",), output_bytes=inner, passes_gradient=True),
        Op(name="gelu", inputs=("fc1 biased",), output_bytes=inner, keeps=("fc1 biased",)),
        linear_op(
            "fc2",
            "gelu",
            role="linear_fc2",
            input_bytes=inner,
            output_bytes=hidden,
            weight_bytes=weight,
            costs=costs,
        ),
        Op(name="fc2 biased", inputs=("fc2",), output_bytes=hidden, passes_gradient=True),
    ]


def scaled_ops(name: str, source: str, size: float, sizes: TowerSizes, costs: LayerCosts) -> list[Op]:
    """LayerScale keeps what it scales; drop path keeps a number per tile."""
    kept = (source,) if costs.is_trained else ()
    ops = [Op(name=f"{name} scaled", inputs=(source,), output_bytes=size, keeps=kept, backward_bytes=size)]
    if sizes.drops_paths:
        ops.append(Op(name=f"{name} dropped", inputs=(f"{name} scaled",), output_bytes=size))
    return ops


def normalised_heads(sizes: TowerSizes, width: float, costs: LayerCosts) -> tuple[tuple[str, str], list[Op]]:
    """What attention takes as queries and keys, and what makes it: norms over all heads, where there are any."""
    if not sizes.qk_normalization:
        return ("heads", "heads"), []
    ops = []
    for side in ("query", "key"):
        whole = Op(
            name=side, inputs=("heads",), output_bytes=width, gradient_bytes=(width,), passes_gradient=True
        )
        ops += [whole, *norm_ops(f"{side} norm", side, width, costs, rms=sizes.rms_norm)]
    return ("query norm", "key norm"), ops


def tower_attention_ops(sizes: TowerSizes, attention: AttentionBytes, costs: LayerCosts) -> list[Op]:
    """norm -> qkv -> (norms) -> attend -> project -> bias -> scale -> add."""
    e = costs.element_bytes
    hidden, width = sizes.rows * sizes.hidden * e, sizes.rows * sizes.width * e
    ops = norm_ops("attention norm", INPUT, hidden, costs, rms=sizes.rms_norm)
    ops += [
        linear_op(
            "qkv",
            "attention norm",
            role="linear_qkv",
            input_bytes=hidden,
            output_bytes=3 * width,
            weight_bytes=3 * sizes.width * sizes.hidden * e,
            costs=costs,
            adds_bias=sizes.qkv_bias,
        ),
        Op(name="heads", inputs=("qkv",), view_of="qkv", output_bytes=3 * width),
    ]
    sides, normalised = normalised_heads(sizes, width, costs)
    ops += normalised
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
            role="linear_proj",
            input_bytes=width,
            output_bytes=hidden,
            weight_bytes=sizes.width * sizes.hidden * e,
            costs=costs,
            forward_bytes=width,  # tiles and tokens are swapped back
            backward_bytes=width,
        ),
        Op(name="projected biased", inputs=("projected",), output_bytes=hidden, passes_gradient=True),
        *scaled_ops("attention", "projected biased", hidden, sizes, costs),
    ]
    ops.append(Op(name="middle", inputs=(INPUT, ops[-1].name), output_bytes=hidden, passes_gradient=True))
    return ops
