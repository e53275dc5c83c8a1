"""Keys and values in eight bits: one scale for each token and head, kept in bfloat16.

    int8   x ~ scale * q,  q in -127..127,  scale = largest |x| of the row / 127
    fp8    x ~ scale * q,  q in float8 e4m3,  scale = largest |x| of the row / 448

The scale is rounded up to bfloat16 before values are divided by it, so that the largest value never overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_v2pe.inference.cache.memory import KVKind

_LARGEST = {"int8": 127.0, "fp8": 448.0}
_STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def stored_dtype(kind: KVKind, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the cache of a model that computes in `dtype`."""
    return dtype if kind == "model" else _STORED[kind]


def quantize(x: Tensor, kind: KVKind) -> tuple[Tensor, Tensor]:
    """[..., d] to values of `stored_dtype` [..., d] and scales, bfloat16 [..., 1]."""
    wide = x.float()
    exact = wide.abs().amax(-1, keepdim=True) / _LARGEST[kind]
    # 1 + 2^-7 covers what rounding to bfloat16 may take away; a row of zeros keeps a scale that divides.
    scale = (exact * (1 + 2**-7)).clamp_min(1e-30).bfloat16()
    scaled = wide / scale.float()
    return (scaled.round() if kind == "int8" else scaled).to(_STORED[kind]), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values and scales back to `dtype`."""
    return (values.float() * scale.float()).to(dtype)
