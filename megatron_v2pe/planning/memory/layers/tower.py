"""A layer of the vision tower as a tape: what `models/vision.py` adds to mcore's layer; and a stack of layers.

Shape legend: t = tiles * (patches + 1) rows, C channels, F feed-forward channels of this rank. Sizes of tensors are
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import VisionConfig
from megatron_v2pe.planning.memory.layers.attention import tower_attention_bytes
from megatron_v2pe.planning.memory.layers.operations import AttentionBytes, LayerCosts, linear_op, norm_ops
from megatron_v2pe.planning.memory.layers.stack import Stack, recomputed_mlp_op, stack
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op
from megatron_v2pe.planning.memory.parameters import tower_heads


@dataclass(frozen=True, kw_only=True)
class TowerShape:
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


def tower_mlp_ops(source: str, sizes: TowerShape, costs: LayerCosts, *, rows: int) -> list[Op]:
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


def scaled_ops(name: str, source: str, size: float, sizes: TowerShape, costs: LayerCosts) -> list[Op]:
    """LayerScale keeps what it scales; drop path keeps a number per tile."""
    kept = (source,) if costs.is_trained else ()
    ops = [Op(name=f"{name} scaled", inputs=(source,), output_bytes=size, keeps=kept, backward_bytes=size)]
    if sizes.drops_paths:
        ops.append(Op(name=f"{name} dropped", inputs=(f"{name} scaled",), output_bytes=size))
    return ops


def normalised_heads(sizes: TowerShape, width: float, costs: LayerCosts) -> tuple[tuple[str, str], list[Op]]:
    """Names of the queries and keys that attention reads, and the norms over all heads that make them, if any."""
    if not sizes.qk_normalization:
        return ("heads", "heads"), []
    ops = []
    for side in ("query", "key"):
        whole = Op(
            name=side, inputs=("heads",), output_bytes=width, gradient_bytes=(width,), passes_gradient=True
        )
        ops += [whole, *norm_ops(f"{side} norm", side, width, costs, rms=sizes.rms_norm)]
    return ("query norm", "key norm"), ops


def tower_attention_ops(sizes: TowerShape, attention: AttentionBytes, costs: LayerCosts) -> list[Op]:
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


def tower_layer_ops(sizes: TowerShape, *, num_heads: int, costs: LayerCosts) -> list[Op]:
    """A layer of the vision tower."""
    hidden = sizes.rows * sizes.hidden * costs.element_bytes
    attention = tower_attention_bytes(rows=sizes.rows, width=sizes.width, num_heads=num_heads, costs=costs)
    ops = tower_attention_ops(sizes, attention, costs)
    ops += norm_ops("mlp norm", "middle", hidden, costs, rms=sizes.rms_norm)
    if sizes.mlp_chunks:
        mlp = tower_mlp_ops(INPUT, sizes, costs, rows=sizes.rows)
        ops.append(
            recomputed_mlp_op("mlp", "mlp norm", mlp, input_bytes=hidden, output_bytes=hidden, mlp_chunks=1)
        )
    else:
        ops += tower_mlp_ops("mlp norm", sizes, costs, rows=sizes.rows)
    ops += scaled_ops("mlp", ops[-1].name, hidden, sizes, costs)
    return [
        *ops,
        Op(name="output", inputs=("middle", ops[-1].name), output_bytes=hidden, passes_gradient=True),
    ]


def tower_shape(arch: InternVLArchitecture, vision: VisionConfig, *, tiles: int, tower_tp: int) -> TowerShape:
    """A layer of the tower for some tiles."""
    tower = arch.vision
    width = tower_heads(tower, tower_tp) * (tower.hidden_size // tower.num_heads) // tower_tp
    return TowerShape(
        rows=tiles * arch.patches_per_tile,
        hidden=tower.hidden_size,
        width=width,
        ffn=tower.ffn_size // tower_tp,
        rms_norm=tower.norm_type == "rms_norm",
        qk_normalization=tower.qk_normalization,
        qkv_bias=tower.qkv_bias,
        drops_paths=vision.drop_path_rate > 0,
        mlp_chunks=1 if vision.recompute == "selective" else 0,
    )


def tower_stack(
    arch: InternVLArchitecture, vision: VisionConfig, *, tiles: int, tower_tp: int, costs: LayerCosts
) -> Stack:
    """Layers of the tower for some tiles."""
    sizes = tower_shape(arch, vision, tiles=tiles, tower_tp=tower_tp)
    heads = tower_heads(arch.vision, tower_tp) // tower_tp
    return stack(
        tower_layer_ops(sizes, num_heads=heads, costs=costs),
        num_layers=arch.vision.num_layers,
        input_bytes=sizes.rows * sizes.hidden * costs.element_bytes,
        recompute=vision.recompute,
    )
