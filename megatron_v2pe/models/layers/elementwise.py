"""Element-wise operations of the model, plain or compiled into one kernel each; assembly says which.

    x + bias -> gelu                                        the tower's MLP and the projector
    (x + bias) * scale * mask + residual                    the tower's LayerScale and drop path
    rotation of queries and keys                            `v2pe.rope.rotated`

One by one, each of these reads and writes its whole tensor; compiled, a group of them does so once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
