"""A stack of equal layers on one rank: what it keeps for backward, and its peaks forward and backward.

    nothing recomputed      L * kept of a layer, then one layer's gradients
    selective               the same with a recomputed MLP, which keeps its input only
    full                    L layer inputs, then one whole layer that is run again

Bytes are of one micro batch on one rank; inputs of the stack count as its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.planning.memory.attention import AttentionShape, context_attention, tower_attention
from megatron_v2pe.planning.memory.decoder_ops import DecoderSizes, attention_ops, gated_mlp_ops
from megatron_v2pe.planning.memory.layers import LayerCosts, norm_ops
from megatron_v2pe.planning.memory.tape import INPUT, Op, Peaks, moved_bytes, peaks
from megatron_v2pe.planning.memory.tower_ops import TowerSizes, scaled_ops, tower_attention_ops, tower_mlp_ops

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Memory of a stack of layers.

    Attributes:
        kept_bytes: between forward and backward.
        host_bytes: kept in host memory instead.
        forward_bytes: most during forward, kept tensors included.
        inference_bytes: most during a forward pass without backward.
        backward_bytes: most during backward, kept tensors and the gradient of the output included.
        moved_forward_bytes: read and written by element-wise operations in a forward pass.
        moved_backward_bytes: the same in backward, recomputation included.
        kept: what a layer keeps, by tensor.
    """

    kept_bytes: float
    host_bytes: float
    forward_bytes: float
    inference_bytes: float
    backward_bytes: float
    moved_forward_bytes: float
    moved_backward_bytes: float
    kept: dict[str, float]


EMPTY = Stack(
    kept_bytes=0.0,
    host_bytes=0.0,
    forward_bytes=0.0,
    inference_bytes=0.0,
    backward_bytes=0.0,
    moved_forward_bytes=0.0,
    moved_backward_bytes=0.0,
    kept={},
)


def stack(
    layer: Sequence[Op], *, num_layers: int, input_bytes: float, recompute: Recompute, offload: bool = False
) -> Stack:
    """`num_layers` copies of a layer whose tape is `layer`, one after the other.

    Kept, none and selective: L * (tensors that a layer's operations read again). full: L inputs, on the host when
    offloaded. Backward, full: all inputs, the layer's recomputed output and its gradient, and what the layer needs to
    run forward and backward again.
    """
    if num_layers == 0:
        return EMPTY
    whole = peaks(layer, input_bytes=input_bytes, keeps_input=True)
    inference = input_bytes + whole.inference_bytes
    forward, backward = (num_layers * moved for moved in moved_bytes(layer, input_bytes=input_bytes))
    if recompute != "full":
        others = (num_layers - 1) * whole.kept_bytes
        return Stack(
            kept_bytes=num_layers * whole.kept_bytes,
            host_bytes=0.0,
            forward_bytes=others + input_bytes + whole.forward_bytes,
            inference_bytes=inference,
            backward_bytes=others + whole.backward_bytes,
            moved_forward_bytes=forward,
            moved_backward_bytes=backward,
            kept=whole.kept,
        )
    inner = peaks(layer, input_bytes=input_bytes)
    inputs = num_layers * input_bytes
    on_device = input_bytes if offload else inputs
    return Stack(
        kept_bytes=0.0 if offload else inputs,
        host_bytes=inputs if offload else 0.0,
        forward_bytes=on_device + inner.inference_bytes,
        inference_bytes=inference,
        backward_bytes=on_device + _again(inner) + input_bytes,
        moved_forward_bytes=forward,
        moved_backward_bytes=forward + backward,
        kept={"layer input": input_bytes},
    )


def _again(inner: Peaks) -> float:
    """Forward and backward of a recomputed part, with the gradient of its output waiting."""
    return max(inner.forward_bytes + inner.output_bytes, inner.backward_bytes)


def recomputed_op(
    name: str, source: str, piece: Sequence[Op], *, input_bytes: float, output_bytes: float, pieces: int
) -> Op:
    """A part that keeps its input and runs again in backward, in `pieces` runs of rows.

    Forward holds the outputs of finished pieces until they are put together. Backward holds one piece at a time, and
    the gradients of all pieces until they are put together: the whole input's once more.
    """
    inner = peaks(piece, input_bytes=input_bytes / pieces)
    forward, backward = (pieces * moved for moved in moved_bytes(piece, input_bytes=input_bytes / pieces))
    joined = 2 * output_bytes  # pieces are put together
    last_piece = output_bytes * (pieces - 1) / pieces + inner.inference_bytes
    return Op(
        name=name,
        inputs=(source,),
        output_bytes=output_bytes,
        keeps=(source,),
        forward_bytes=max(last_piece - output_bytes, output_bytes),
        backward_bytes=max(_again(inner) - inner.output_bytes, input_bytes),
        moved=(forward + joined, forward + backward + 2 * input_bytes),
    )


def decoder_layer(sizes: DecoderSizes, shape: AttentionShape, *, backend: str, costs: LayerCosts) -> list[Op]:
    """A decoder layer."""
    hidden = sizes.rows * sizes.hidden * costs.element_bytes
    ops = attention_ops(sizes, context_attention(shape, costs, backend), costs)
    ops += norm_ops("mlp norm", "middle", hidden, costs)
    if sizes.mlp_chunks:
        piece = gated_mlp_ops(INPUT, sizes, costs, tokens=sizes.tokens // sizes.mlp_chunks)
        ops.append(
            recomputed_op(
                "mlp",
                "mlp norm",
                piece,
                input_bytes=hidden,
                output_bytes=hidden,
                pieces=sizes.mlp_chunks,
            )
        )
    else:
        ops += gated_mlp_ops("mlp norm", sizes, costs, tokens=sizes.tokens)
    return [
        *ops,
        Op(name="output", inputs=("middle", ops[-1].name), output_bytes=hidden, passes_gradient=True),
    ]


def tower_layer(sizes: TowerSizes, *, num_heads: int, costs: LayerCosts) -> list[Op]:
    """A layer of the vision tower."""
    hidden = sizes.rows * sizes.hidden * costs.element_bytes
    attention = tower_attention(rows=sizes.rows, width=sizes.width, num_heads=num_heads, costs=costs)
    ops = tower_attention_ops(sizes, attention, costs)
    ops += norm_ops("mlp norm", "middle", hidden, costs, rms=sizes.rms_norm)
    if sizes.mlp_chunks:
        piece = tower_mlp_ops(INPUT, sizes, costs, rows=sizes.rows)
        ops.append(recomputed_op("mlp", "mlp norm", piece, input_bytes=hidden, output_bytes=hidden, pieces=1))
    else:
        ops += tower_mlp_ops("mlp norm", sizes, costs, rows=sizes.rows)
    ops += scaled_ops("mlp", ops[-1].name, hidden, sizes, costs)
    return [
        *ops,
        Op(name="output", inputs=("middle", ops[-1].name), output_bytes=hidden, passes_gradient=True),
    ]
