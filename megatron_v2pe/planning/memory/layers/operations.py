"""What the operations of a layer allocate and keep, whatever layer it is: norms and linears of a back end.

    norm        fused (Transformer Engine, LayerNorm) keeps its input; torch's RMSNorm keeps a float32 copy of it
                (half precision) and the normalised rows
    linear      keeps its input; its weight's gradient exists for a moment

An operation here is a line of `models/` or of mcore's attention.py and mlp.py. e is the bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.layers.tape import Op

FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """What the modules of a back end allocate.

    Attributes:
        element_bytes: of the compute dtype.
        fused_norm: RMSNorm keeps its input and statistics only.
        float_attention: attention computes in float32 whatever the dtype is (torch's costs on a CPU).
        expands_keys: key gradients are formed for every query head and then summed (grouped heads on the CPU).
        is_trained: linears keep their inputs for the gradients of their weights.
        adapters: pairs of each linear of a layer (`linear_qkv`, ...) that has any.
        drops_inputs: adapters drop numbers of their inputs, and keep what is left.
        fp8: linears multiply in FP8, and keep their inputs in it.
    """

    element_bytes: int
    fused_norm: bool
    float_attention: bool
    expands_keys: bool
    is_trained: bool = True
    adapters: tuple[tuple[str, int], ...] = ()
    drops_inputs: bool = False
    fp8: bool = False


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


def norm_ops(name: str, source: str, size: float, costs: LayerCosts, *, rms: bool = True) -> list[Op]:
    """A norm: output `size` bytes.

    Fused, as ours is in float32 on a CPU: keeps its input. torch's RMSNorm: y = (x float32 * rsqrt(mean x^2)) in the
    dtype, times the weight; keeps x as float32 (in half precision a copy) and y before the weight.
    """
    is_ours = costs.float_attention and costs.element_bytes >= FLOAT_BYTES  # on a CPU
    if costs.fused_norm or is_ours or not rms:
        return [Op(name=name, inputs=(source,), output_bytes=size, keeps=(source,))]
    whole = size * FLOAT_BYTES / costs.element_bytes
    ops, read = [], source
    if costs.element_bytes < FLOAT_BYTES:
        read = f"{name} float32"
        ops.append(Op(name=read, inputs=(source,), output_bytes=whole))
    hat = f"{name} normalised"
    kept_hat = (hat,) if costs.is_trained else ()
    return [
        *ops,
        Op(
            name=hat,
            inputs=(read,),
            output_bytes=size,
            keeps=(read,),
            forward_bytes=whole,
            backward_bytes=(2 if costs.element_bytes == FLOAT_BYTES else 3) * whole,
        ),
        Op(name=name, inputs=(hat,), output_bytes=size, keeps=kept_hat, backward_bytes=size),
    ]


@dataclass(frozen=True, kw_only=True)
class _Fp8Bytes:
    """What a linear allocates because it multiplies in FP8."""

    kept_bytes: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


def _fp8_bytes(role: str, inputs: float, outputs: float, costs: LayerCosts) -> _Fp8Bytes:
    """A byte for each number: the input by rows for its product, by columns for the weight's gradient, which is kept.

    The gradient of the output has both forms in backward. The output of attention is kept by attention anyway, so its
    linear keeps no other form of it, and makes that in backward (mcore's `save_original_input`).
    """
    if not costs.fp8:
        return _Fp8Bytes()
    again = inputs if role == "linear_proj" and costs.is_trained else 0.0
    return _Fp8Bytes(
        kept_bytes=inputs if costs.is_trained and role != "linear_proj" else 0.0,
        forward_bytes=inputs,
        backward_bytes=2 * outputs + again,
    )


def linear_op(
    name: str,
    source: str,
    *,
    role: str,
    input_bytes: float,
    output_bytes: float,
    weight_bytes: float,
    costs: LayerCosts,
    adds_bias: bool = False,
    forward_bytes: float = 0.0,
    backward_bytes: float = 0.0,
) -> Op:
    """A linear: keeps its input for the weight's gradient, which exists for a moment in the compute dtype.

    A bias is added out of place. A frozen linear keeps nothing and forms no weight gradient. Adapters keep the input
    too, or what dropout leaves of it with a mask, for each pair; in forward their output and its sum with the linear's
    are two tensors more, in backward there is a gradient of the input for each side.

    Args:
        name: of the operation.
        source: name of the input.
        role: mcore's name of the linear, by which adapters are found.
        input_bytes: size of the input.
        output_bytes: size of the output.
        weight_bytes: size of the weight.
        costs: of the back end.
        adds_bias: the linear itself adds a bias.
        forward_bytes: otherwise needed for a moment in forward.
        backward_bytes: the same in backward.
    """
    pairs = dict(costs.adapters).get(role, 0)
    fp8 = _fp8_bytes(role, input_bytes / costs.element_bytes, output_bytes / costs.element_bytes, costs)
    # On a CPU torch keeps the factors of dropout in the input's dtype, on a GPU a byte for each.
    mask = input_bytes if costs.float_attention else input_bytes / costs.element_bytes
    return Op(
        name=name,
        inputs=(source,),
        output_bytes=output_bytes,
        keeps=(source,)
        if (costs.is_trained and not fp8.kept_bytes) or (pairs and not costs.drops_inputs)
        else (),
        keeps_extra_bytes=fp8.kept_bytes + (pairs * (input_bytes + mask) if costs.drops_inputs else 0.0),
        forward_bytes=forward_bytes
        + fp8.forward_bytes
        + (output_bytes if adds_bias else 0.0)
        + (2 * output_bytes if pairs else 0.0),
        backward_bytes=backward_bytes
        + fp8.backward_bytes
        + (weight_bytes if costs.is_trained else 0.0)
        + (output_bytes + input_bytes if pairs else 0.0),
        is_matrix=True,
    )
