"""Attention core on torch's own kernels: the CPU's, and a GPU's without Transformer Engine.

    decoder   packed (thd): rotate -> per-document causal attention over context parallel ranks (see `context_parallel`)
              generation:   rotate -> attend to themselves and the cache, which is extended (see `cached`)
    vision    sbhd, no mask: torch's scaled dot product attention, tile by tile

It is what mcore calls a core attention; projections are done outside. Its one parameter is the sink, which a model with
`softmax_type: learnable` has: a logit of each query head that joins the softmax and has no value. Layers that mcore's
`window_size` and `window_attn_skip_freq` name see the newest tokens of a document only.

Shape legend: l local tokens, s sequence, b batch, h query heads, k key heads, d head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.attention.cached import cached_attention
from megatron_v2pe.parallel.attention.context_parallel import context_parallel_attention, document_attention
from megatron_v2pe.parallel.attention.documents import local_lengths
from megatron_v2pe.parallel.attention.rotary import rotate
from megatron_v2pe.parallel.attention.transports.direct import places_of
from megatron_v2pe.parallel.attention.windows import layer_window

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class NativeContextAttention(torch.nn.Module):
    """mcore core attention; see the module's docstring. Arguments are those that mcore's SelfAttention gives.

    Args:
        config: mcore's configuration of the part this layer belongs to.
        layer_number: 1-based, the key of the decoding cache.
        attn_mask_type: `causal` or `no_mask`; a call may override it.
        attention_type: "self".
        cp_comm_type: how keys, or heads, are exchanged; "p2p" (also None), "all_gather" or "a2a".
        softmax_scale: factor of the scores, 1/sqrt(d) when None.
        pg_collection: groups of the part; `cp` is used if the part has context parallelism, `tp` if it has sinks.

    Attributes:
        window: newest tokens of its document that a query sees, itself included; None for all.
        softmax_offset: the sink, [h], mcore's name for it; None without one.

    Raises:
        ConfigError: dropout, a kind of softmax, or a window that there is none of here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ConfigError(
                f"attention_dropout is {config.attention_dropout}, but native attention has no dropout; set it to 0"
            )
        self.attend = context_parallel_attention(cp_comm_type)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                raise ValueError("context parallelism needs the groups of the part it is used in")
            self.cp_group = pg_collection.cp
        self.window = layer_window(config, layer_number)
        self.tp_group = None if pg_collection is None else getattr(pg_collection, "tp", None)
        self.softmax_offset: torch.nn.Parameter | None
        self.register_parameter("softmax_offset", self._sink(config))

    def _sink(self, config: TransformerConfig) -> torch.nn.Parameter | None:
        if config.softmax_type == "vanilla":
            return None
        if config.softmax_type != "learnable":
            raise ConfigError(
                f"softmax_type is {config.softmax_type!r}, but native attention has vanilla and learnable"
            )
        size, rank = (1, 0) if self.tp_group is None else (self.tp_group.size(), self.tp_group.rank())
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        heads = torch.empty(config.num_attention_heads, dtype=config.params_dtype, device=device)
        if config.perform_initialization:
            assert config.init_method is not None  # mcore fills it in
            config.init_method(heads)
        sink = torch.nn.Parameter(heads.chunk(size)[rank].clone())
        set_tensor_model_parallel_attributes(sink, is_parallel=True, dim=0, stride=1)
        return sink

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sink of this rank's heads, along dimension 0; nothing without one."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [l, h, d] packed, or [s, b, h, d].
            key: [l, k, d] packed, or [s, b, k, d].
            value: as `key`.
            attention_mask: must be None; `attn_mask_type` is the mask.
            attn_mask_type: overrides the layer's.
            attention_bias: must be None.
            packed_seq_params: boundaries of the documents (global, padded), angles and cache; None for sbhd.

        Returns:
            [l, h * d] packed, or [s, b, h * d].
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("native attention has no mask and no bias tensors, only attn_mask_type")
        causal = (attn_mask_type or self.attn_mask_type) in CAUSAL
        if packed_seq_params is None:
            return self._unpacked(query, key, value, causal=causal)
        if not causal:
            raise ValueError("packed documents are attended causally; got a mask type without causality")
        return self._packed(query, key, value, packed_seq_params)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        query, key = rotate(query, key, params)
        step = getattr(params, "kv_cache", None)
        if step is None:
            return self._attend(query, key, value, params)
        return cached_attention(
            query,
            key,
            value,
            step=step,
            layer_number=self.layer_number,
            scale=self.scale,
            window=self.window,
            sink=self.softmax_offset,
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, params: PackedSeqParams) -> Tensor:
        group = self.cp_group if params.cp_group is None else params.cp_group
        rule: dict[str, Any] = dict(scale=self.scale, window=self.window, sink=self.softmax_offset)
        holders = getattr(params, "document_holders", None)
        if holders is not None:
            if group is None:
                raise ValueError("documents on some of the ranks need the group of these ranks")
            places = places_of(params.document_lengths, holders)  # type: ignore[attr-defined]
            out = document_attention(query, key, value, places=places, group=group, **rule)
            return out.flatten(1)
        lengths = local_lengths(params, 1 if group is None else group.size())
        out = self.attend(query, key, value, lengths=lengths, group=group, **rule)
        return out.flatten(1)  # [l, h, d] -> [l, h * d]

    def _unpacked(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        if self.cp_group is not None:
            raise ValueError("context parallelism needs packed_seq_params, which bound the documents")
        if self.window is not None or self.softmax_offset is not None:
            raise ValueError("windows and sinks need packed_seq_params, which bound the documents")
        q, k, v = (_for_cpu(x).permute(1, 2, 0, 3) for x in (query, key, value))  # [s,b,h,d] -> [b,h,s,d]
        grouped = query.shape[2] != key.shape[2]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2).to(query.dtype)  # [b, h, s, d] -> [s, b, h * d]


def _for_cpu(x: Tensor) -> Tensor:
    """See `kernels`: on the CPU half precision is slower than float32, by much in backward."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x
