"""Rotation of queries and keys inside the attention core, where the angles of the local tokens are at hand."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams
from megatron_v2pe.v2pe.rope import apply_rotary


class _Rotation(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the negative angle, so only the angles are saved.

    All layers share one table of angles; autograd's own formula would keep sines and cosines in each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor, round_tables: bool) -> Tensor:
        ctx.save_for_backward(angles)
        ctx.round_tables = round_tables
        return apply_rotary(x, angles, round_tables=round_tables)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (angles,) = ctx.saved_tensors
        return apply_rotary(grads[0], -angles, round_tables=ctx.round_tables), None, None


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
    rotated = (_Rotation.apply(x, angles, params.round_rotary) for x in (query, key))
    return next(rotated), next(rotated)
