"""What the attention core needs to know about a micro batch, beyond queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_v2pe.batch.kv_cache import CacheStep
from megatron_v2pe.v2pe.rope import rotary_tables, rotated


@dataclass
class V2PEPackedSeqParams(PackedSeqParams):
    """mcore's packed-sequence parameters with the rotary angles of the local tokens.

    The attention core rotates queries and keys itself, so that mcore's thd rotary, which re-slices its table
    by the context parallel rank, never sees a position. mcore carries this object to every layer untouched.

    Attributes:
        rotary_angles: float32 [l, d/2], angles of this rank's tokens, one table for all layers.
        rotary_scale: attention factor of the rotary embedding, multiplies cos and sin.
        round_rotary: round cos and sin to the compute dtype before use (`rope_precision: reference`).
        rotated: how heads are rotated by tables.
        document_lengths: padded tokens of each document, global, on the host; None reads them from the boundaries.
        document_holders: for each document the context parallel ranks that hold it; None where all hold a part.
        kv_cache: what is done with keys and values of earlier tokens (generation); None in training.
        routed: what the routers of a mixture of experts must know of the rows, a `models.experts.RoutedRows`; it
            travels here because a layer that is computed again must get that of its own micro batch.
    """

    rotary_angles: Tensor | None = None
    rotary_scale: float = 1.0
    round_rotary: bool = False
    rotated: Callable[..., Tensor] = rotated
    document_lengths: tuple[int, ...] | None = None
    document_holders: tuple[tuple[int, ...], ...] | None = None
    kv_cache: CacheStep | None = None
    routed: Any = None

    def rotary_tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles for heads in `dtype`, made once for all layers."""
        assert self.rotary_angles is not None
        tables: dict[torch.dtype, tuple[Tensor, Tensor]] = self.__dict__.setdefault("_tables", {})
        if dtype not in tables:
            tables[dtype] = rotary_tables(
                self.rotary_angles, dtype, scale=self.rotary_scale, round_tables=self.round_rotary
            )
        return tables[dtype]
