"""Attention core of Transformer Engine after our rotation. Import it only where Transformer Engine is installed.

mcore's fused rotary for packed sequences starts its table anew in every document, so it cannot express a
position per token. Here queries and keys are rotated by the local tokens' own angles, then passed on as plain
packed sequences whose padded boundaries are also the real ones: padding counts as tokens, which causal
attention never shows to earlier ones. (Left to detect padding itself, Transformer Engine 2.11 is wrong by up to
30 % when only the last document is padded.)

A faster rotation exists: Transformer Engine's sbhd kernel with cp 1 reads row i of a [l, 1, 1, d] table
for local token i, whatever documents there are. The kernel's results would have to be compared on a GPU first.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_v2pe.parallel.attention.cached import cached_attention
from megatron_v2pe.parallel.attention.documents import padding_counts_as_tokens
from megatron_v2pe.parallel.attention.rotary import rotate

logger = logging.getLogger(__name__)

_UNFUSED = "NVTE_UNFUSED_ATTN"


class RotaryTEAttention(TEDotProductAttention):
    """Transformer Engine's attention for the decoder; rotates, and generates with a cache on torch's kernels.

    In half precision its unfused kernels are ruled out, unless the environment asks for them: they form all scores of
    a document, quadratic in its length, and would be chosen in silence where no fused kernel suits. In float32 there
    are no others.

    With `a2a` its exchange waits for the GPU once for each document and direction in every layer, to put the shards of
    a document side by side; native attention exchanges all documents by one index.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.params_dtype in (torch.bfloat16, torch.float16):
            os.environ.setdefault(_UNFUSED, "0")
        if kwargs.get("cp_comm_type") == "a2a" and self.config.context_parallel_size > 1:
            _warn_of_a2a()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See `NativeContextAttention.forward`; only packed sequences are supported."""
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            raise ValueError("the decoder's attention supports packed sequences (thd) only")
        query, key = rotate(query, key, packed_seq_params)
        step = getattr(packed_seq_params, "kv_cache", None)
        if step is None:
            params = padding_counts_as_tokens(packed_seq_params)
            return TEDotProductAttention.forward(
                self, query, key, value, attention_mask, attn_mask_type, attention_bias, params, **kwargs
            )
        return cached_attention(
            query,
            key,
            value,
            step=step,
            layer_number=self.layer_number,
            scale=self.config.softmax_scale or self.config.kv_channels**-0.5,
        )


@lru_cache(maxsize=1)  # once, not for every layer
def _warn_of_a2a() -> None:
    logger.warning(
        "parallel.cp_comm_type is a2a with Transformer Engine, which waits for the GPU once for each document of a "
        "pack in every layer; with many documents parallel.attention_backend=native, or p2p, is faster"
    )
