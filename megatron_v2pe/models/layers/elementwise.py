"""Element-wise operations of the model, plain or compiled into one kernel each; assembly says which.

    x + bias -> gelu                                        the tower's MLP and the projector
    (x + bias) * scale * mask + residual                    the tower's LayerScale and drop path
    rotation of queries and keys                            `v2pe.rope.rotated`
    silu(gate) * up                                         the decoder's MLP, where mcore's fused SwiGLU is not used

One by one, each of these reads and writes its whole tensor; compiled, a group of them does so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.v2pe.rope import rotated


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Exact GELU of x + bias, [..., F] and [F]."""
    return F.gelu(x + bias)


def scaled_residual(x: Tensor, bias: Tensor | None, scale: Tensor, residual: Tensor) -> Tensor:
    """residual + (x + bias) * scale: [..., C], [C] or None, [C], [..., C]."""
    x = x if bias is None else x + bias
    return residual + x * scale


def scaled_dropped_residual(
    x: Tensor, bias: Tensor | None, scale: Tensor, mask: Tensor, residual: Tensor
) -> Tensor:
    """residual + (x + bias) * scale * mask; the mask is 0 or 1 / (1 - rate) for each tile, [1, n, 1]."""
    x = x if bias is None else x + bias
    return residual + x * scale * mask


@dataclass(frozen=True, kw_only=True)
class ElementwiseOps:
    """What a model calls for them; the defaults run operation by operation.

    Attributes:
        bias_gelu: see `bias_gelu`.
        scaled_residual: see `scaled_residual`.
        scaled_dropped_residual: see `scaled_dropped_residual`.
        rotated: see `v2pe.rope.rotated`.
    """

    bias_gelu: Callable[..., Tensor] = bias_gelu
    scaled_residual: Callable[..., Tensor] = scaled_residual
    scaled_dropped_residual: Callable[..., Tensor] = scaled_dropped_residual
    rotated: Callable[..., Tensor] = rotated


def mlp_with_bias_gelu(
    mlp: Any, hidden: Tensor, *, fused: Callable[..., Tensor], **_: Any
) -> tuple[Tensor, Tensor | None]:
    """mcore's MLP with its first bias and GELU in one call: hidden [s, b, C] to (output, bias of the second linear)."""
    inner, bias = mlp.linear_fc1(hidden)
    return mlp.linear_fc2(fused(inner, bias))


class _GatedSilu(torch.autograd.Function):
    """silu(first half of x) * second half, [..., 2F] to [..., F]; the gradient is written where it belongs.

    Keeps x and the silu. mcore's own adds an offset of 0 to the second half, and keeps a copy of that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(grads[0], activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad_x


def mlp_with_swiglu(mlp: Any, hidden: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
    """mcore's MLP with SwiGLU operation by operation, to the bit: [s, b, H] to (output, bias of the second linear)."""
    inner, bias = mlp.linear_fc1(hidden)
    return mlp.linear_fc2(_GatedSilu.apply(inner if bias is None else inner + bias))
