"""A stack of equal layers on one rank: what it keeps for backward, and its peaks forward and backward.

    nothing recomputed      L * kept of a layer, then one layer's gradients
    selective               the same with a recomputed MLP, which keeps its input only
    full                    L layer inputs, then one whole layer that is run again

Bytes are of one micro batch on one rank; inputs of the stack count as its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_v2pe.planning.memory.layers.tape import Op, Peaks, moved_bytes, peaks

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
        backward_bytes=on_device + recomputed_bytes(inner) + input_bytes,
        moved_forward_bytes=forward,
        moved_backward_bytes=forward + backward,
        kept={"layer input": input_bytes},
    )


def mixed(first: Stack, second: Stack, *, share: float) -> Stack:
    """A stack of which a share of the layers is like the first and the others like the second, of as many layers."""
    if share == 1:
        return first
    names = [each.name for each in fields(Stack) if each.name != "kept"]
    values = {name: share * getattr(first, name) + (1 - share) * getattr(second, name) for name in names}
    return Stack(**values, kept=first.kept)


def recomputed_bytes(inner: Peaks) -> float:
    """Forward and backward of a recomputed part, with the gradient of its output waiting."""
    return max(inner.forward_bytes + inner.output_bytes, inner.backward_bytes)


def recomputed_mlp_op(
    name: str, source: str, mlp: Sequence[Op], *, input_bytes: float, output_bytes: float, mlp_chunks: int
) -> Op:
    """An MLP that keeps its input and runs again in backward, in `mlp_chunks` slices of the rows.

    Forward holds the outputs of finished slices until they are joined. Backward holds one slice at a time, and the
    gradients of all slices until they are joined: the whole input's once more.

    Args:
        name: of the operation.
        source: name of the input.
        mlp: tape of one slice.
        input_bytes: size of the whole input.
        output_bytes: size of the whole output.
        mlp_chunks: number of slices.
    """
    slice_bytes = input_bytes / mlp_chunks
    inner = peaks(mlp, input_bytes=slice_bytes)
    forward, backward = (mlp_chunks * moved for moved in moved_bytes(mlp, input_bytes=slice_bytes))
    joined = 2 * output_bytes  # slices are read, the whole is written
    last_slice = output_bytes * (mlp_chunks - 1) / mlp_chunks + inner.inference_bytes
    return Op(
        name=name,
        inputs=(source,),
        output_bytes=output_bytes,
        keeps=(source,),
        forward_bytes=max(last_slice - output_bytes, output_bytes),
        backward_bytes=max(recomputed_bytes(inner) - inner.output_bytes, input_bytes),
        moved=(forward + joined, forward + backward + 2 * input_bytes),
    )
