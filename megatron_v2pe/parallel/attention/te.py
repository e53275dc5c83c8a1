"""Attention core of Transformer Engine after our rotation. Import it only where Transformer Engine is installed.

mcore's fused rotary for packed sequences starts its table anew in every document, so it cannot express a
position per token. Here queries and keys are rotated by the local tokens' own angles, then passed on as plain
packed sequences whose padded boundaries are also the real ones: padding counts as tokens, which causal
attention never shows to earlier ones. (Left to detect padding itself, Transformer Engine 2.11 is wrong by up to
30 % when only the last document is padded.)

A faster rotation exists: Transformer Engine's sbhd kernel with cp 1 reads row i of a [l, 1, 1, d] table
for local token i, whatever documents there are. The kernel's results would have to be compared on a GPU first.

Windows are mcore's `window_size`, which Transformer Engine's kernels take. Its ring has none, so they need one rank or
`a2a`; sinks it has for unpacked sequences only (2.8 to 2.11), so models with them have `native`'s core (see
`assembly.backend_modules`).
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_v2pe.core.env import set_where_unset
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.cached import cached_attention
from megatron_v2pe.parallel.attention.documents import local_lengths, padding_counts_as_tokens
from megatron_v2pe.parallel.attention.rotary import rotate
from megatron_v2pe.parallel.attention.transports.heads import by_heads
from megatron_v2pe.parallel.attention.windows import layer_window

_UNFUSED = "NVTE_UNFUSED_ATTN"


class RotaryTEAttention(TEDotProductAttention):
    """Transformer Engine's attention for the decoder; rotates, and generates with a cache on torch's kernels.

    In half precision its unfused kernels are ruled out, unless the environment asks for them: they form all scores of
    a document, quadratic in its length, and would be chosen in silence where no fused kernel suits. In float32 there
    are no others.

    With `a2a` tokens are exchanged for heads here (`heads`), and Transformer Engine attends to whole documents with
    this rank's heads, as if there were no context parallelism. Its own exchange puts the shards of a document side by
    side one document after the other, and the host waits for the GPU at each, in every layer and direction.

    Raises:
        ConfigError: sinks, or a window over context parallel ranks that do not exchange heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        cp_comm_type: str | None = "p2p",
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        window = layer_window(config, layer_number)
        _check_softmax(config, window, cp_comm_type)
        self.head_group = None
        if cp_comm_type == "a2a" and config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("context parallelism needs the groups of the part it is used in")
            self.head_group = pg_collection.cp
            config = _share_of_heads(config)
        super().__init__(
            config, layer_number, *args, cp_comm_type=cp_comm_type, pg_collection=pg_collection, **kwargs
        )
        self.window = window
        if self.config.params_dtype in (torch.bfloat16, torch.float16):
            set_where_unset(_UNFUSED, "0")

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

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                """[t, n, d] to [t, n * d]."""
                return TEDotProductAttention.forward(
                    self, query, key, value, attention_mask, attn_mask_type, attention_bias, params, **kwargs
                )

            if self.head_group is None:
                return attend(query, key, value)
            return by_heads(
                query,
                key,
                value,
                lengths=local_lengths(packed_seq_params, self.head_group.size()),
                group=self.head_group,
                core=lambda *qkv: attend(*(x.contiguous() for x in qkv)).reshape(qkv[0].shape),
            ).flatten(1)
        return cached_attention(
            query,
            key,
            value,
            step=step,
            layer_number=self.layer_number,
            scale=self.config.softmax_scale or self.config.kv_channels**-0.5,
            window=self.window,
        )


def _check_softmax(config: TransformerConfig, window: int | None, cp_comm_type: str | None) -> None:
    if config.softmax_type != "vanilla":
        raise ConfigError(
            f"softmax_type is {config.softmax_type!r}, but Transformer Engine's attention has sinks for unpacked "
            "sequences only; use native attention"
        )
    if window is not None and config.context_parallel_size > 1 and cp_comm_type != "a2a":
        raise ConfigError(
            f"parallel.cp_comm_type is {cp_comm_type!r}, but Transformer Engine's ring has no sliding windows for "
            "packed sequences; use a2a, or set parallel.attention_backend to native"
        )


def _share_of_heads(config: TransformerConfig) -> TransformerConfig:
    """The configuration of attention with the heads of one of the context parallel ranks, and all tokens."""
    cp = config.context_parallel_size
    share = copy(config)
    share.context_parallel_size = 1
    share.num_attention_heads //= cp
    if share.num_query_groups is not None:
        share.num_query_groups //= cp
    return share
