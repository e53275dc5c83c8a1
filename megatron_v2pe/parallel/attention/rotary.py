"""Rotation of queries and keys inside the attention core, where the angles of the local tokens are known."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.v2pe.rope import apply_rotary


class _Rotation(torch.autograd.Function):
    """The transpose of a scaled rotation is that of the negative angle, so only the angles are saved.

    All layers share one table of angles; autograd's own formula would keep sines and cosines in each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, scale: float, round_tables: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.scale, ctx.round_tables = scale, round_tables
        return apply_rotary(x, angles, scale=scale, round_tables=round_tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        turned_back = apply_rotary(grads[0], -angles, scale=ctx.scale, round_tables=ctx.round_tables)
        return turned_back, None, None, None


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
    rotated = (_Rotation.apply(x, angles, params.rotary_scale, params.round_rotary) for x in (query, key))
    return next(rotated), next(rotated)
