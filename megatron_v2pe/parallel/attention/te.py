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

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_v2pe.parallel.attention.cached import cached_attention
from megatron_v2pe.parallel.attention.documents import padding_counts_as_tokens
from megatron_v2pe.parallel.attention.rotary import rotate


class RotaryTEAttention(TEDotProductAttention):
    """Transformer Engine's attention for the decoder; rotates, and generates with a cache on torch's kernels."""

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
