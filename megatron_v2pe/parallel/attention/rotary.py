"""Rotation of queries and keys inside the attention core, where the angles of the local tokens are known."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams


class _Rotation(torch.autograd.Function):
    """The transpose of a scaled rotation is that of the negative angle, so only the tables are saved.

    All layers share one table of cosines and one of sines.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: V2PEPackedSeqParams) -> Tensor:
        cos, sin = params.rotary_tables(x.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.rotated = params.rotated
        return ctx.rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.rotated(grads[0], cos, -sin), None


def rotate(query: Tensor, key: Tensor, params: PackedSeqParams | None) -> tuple[Tensor, Tensor]:
    """Rotate by the angles that `params` carries; parameters without angles leave both as they are.

    Args:
        query: [l, h, d].
        key: [l, k, d].
        params: packed parameters of the micro batch.
    """
    if not isinstance(params, V2PEPackedSeqParams) or params.rotary_angles is None:
        return query, key
    angles = params.rotary_angles
    if len(angles) != len(query):
        raise ValueError(
            f"{len(angles)} rotary angles for {len(query)} local tokens; angles are cut by the same index as tokens"
        )
    return _Rotation.apply(query, params), _Rotation.apply(key, params)
