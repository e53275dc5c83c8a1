"""InternViT: patches, a class token, learned positions, bidirectional layers with LayerScale.

    x = [class, conv(pixels)] + positions
    x = x + drop_path(attention(norm1(x)) * ls1)         for each layer
    x = x + drop_path(mlp(norm2(x)) * ls2)
    no final norm                                         (release: InternVisionModel)

Shape legend: n tiles, P patches of a tile, C channels, S tile size in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_v2pe.models.layers.elementwise import ElementwiseOps, mlp_with_bias_gelu
from megatron_v2pe.models.layers.layer_specs import BackendModules, vision_layer_spec
from megatron_v2pe.models.memory import RecomputingLayer, is_trained

# Parameters of a linear, its adapters among them, that grow with the number of heads.
_ALONG_HEADS = {"linear_qkv": (".weight", ".bias", ".lora_B"), "linear_proj": (".weight", ".lora_A")}
BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


def drop_mask(x: Tensor, rate: float) -> Tensor:
    """Factors [1, n, 1] of tiles [P, n, C]: 0 with probability `rate`, else 1/(1-rate)."""
    keep = 1.0 - rate
    return x.new_empty(1, x.shape[1], 1).bernoulli_(keep).div_(keep)


class InternViTAttention(SelfAttention):
    """Self attention that can normalise queries and keys over all heads together, before they are split.

    InternViT-6B does so (`qk_normalization`); mcore's own q/k norms work head by head. The attributes do not
    carry mcore's names (q_layernorm), by which it would sum their gradients over tp.

    A tower split over tp may have more heads than the checkpoint, so that they divide evenly; the added ones are
    zero, get zero gradients, and are not in checkpoints.

    Args:
        qk_norm: class of the norm, or None.
    """

    def __init__(self, config: TransformerConfig, *args: Any, qk_norm: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.has_padded_heads = config.num_attention_heads * config.kv_channels != config.hidden_size
        if self.has_padded_heads:
            for parameter in (*self.linear_qkv.parameters(), self.linear_proj.weight):
                torch.nn.init.zeros_(parameter)
        self.q_norm = None
        self.k_norm = None
        if qk_norm is not None:
            width = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
            eps = config.layernorm_epsilon
            self.q_norm = qk_norm(config=config, hidden_size=width, eps=eps)
            self.k_norm = qk_norm(config=config, hidden_size=width, eps=eps)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """mcore's projection to queries, keys, values [P, n, heads, head_dim], then the norms."""
        projected = super().get_query_key_value_tensors(*args, **kwargs)
        if self.q_norm is None or self.k_norm is None:
            return projected
        query, key, *rest = projected
        return (_over_heads(self.q_norm, query), _over_heads(self.k_norm, key), *rest)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """mcore's shards; padded heads let stored and wanted shapes differ along the heads."""
        shards = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.has_padded_heads:
            for linear, ends in _ALONG_HEADS.items():
                for key, shard in shards.items():
                    if key.startswith(f"{prefix}{linear}.") and key.endswith(ends):
                        shard.allow_shape_mismatch = True
        return shards


def _over_heads(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Apply a norm of the full width: [P, n, heads, d] -> [P, n, heads*d] -> [P, n, heads, d]."""
    return norm(x.flatten(-2)).view_as(x)


class InternViTLayer(RecomputingLayer):
    """mcore's layer with LayerScale (`ls1`, `ls2`) and drop path in place of bias-dropout-add.

    Args:
        drop_path_rates: stochastic depth rate of each layer of the tower.
        elementwise: how bias, GELU, LayerScale and drop path are computed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        drop_path_rates: tuple[float, ...],
        elementwise: ElementwiseOps,
        **kwargs: Any,
    ) -> None:
        mlp_forward = partial(mlp_with_bias_gelu, fused=elementwise.bias_gelu)
        super().__init__(config, *args, mlp_forward=mlp_forward, **kwargs)
        self.elementwise = elementwise
        self.ls1 = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.ls2 = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
        self.drop_path_rate = drop_path_rates[self.layer_number - 1]
        self.self_attn_bda = partial(self._scale_drop_add, "ls1")
        self.mlp_bda = partial(self._scale_drop_add, "ls2")

    def _scale_drop_add(self, scale_name: str, training: bool, fused: bool) -> BiasDropoutAdd:
        """What mcore calls instead of bias-dropout-add; `fused` is mcore's and is not used here."""

        def apply(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            x, bias = output_with_bias
            scale = getattr(self, scale_name)
            if training and self.drop_path_rate > 0:
                mask = drop_mask(x, self.drop_path_rate)
                return self.elementwise.scaled_dropped_residual(x, bias, scale, mask, residual)
            return self.elementwise.scaled_residual(x, bias, scale, residual)

        return apply


class InternViT(MegatronModule):
    """The vision tower: whole on each rank (groups of one), or split over the tp group it is given.

    Args:
        config: mcore's configuration of the tower.
        modules: modules of the back end.
        image_size: size in pixels that the position table was made for.
        patch_size: pixels of a patch's side.
        drop_path_rate: rate of the last layer; rises linearly from 0 (release: linspace).
        qk_norm: what normalises queries and keys over the full width, or None.
        mlp_chunks: MLP chunks that are recomputed one by one; 0 keeps an MLP's activations.
        elementwise: how bias, GELU, LayerScale and drop path are computed.
        groups: process groups; singletons for a whole tower.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        modules: BackendModules,
        image_size: int,
        patch_size: int,
        drop_path_rate: float,
        qk_norm: Any,
        mlp_chunks: int,
        elementwise: ElementwiseOps,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        self.tp_group = groups.tp
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        channels, dtype = config.hidden_size, config.params_dtype
        self.patch_embedding = torch.nn.Conv2d(3, channels, patch_size, patch_size, dtype=dtype)
        self.class_embedding = torch.nn.Parameter(torch.zeros(1, 1, channels, dtype=dtype))
        self.position_embedding = torch.nn.Parameter(torch.zeros(1, self.grid**2 + 1, channels, dtype=dtype))
        rates = tuple(torch.linspace(0, drop_path_rate, config.num_layers, device="cpu").tolist())
        spec = vision_layer_spec(
            modules,
            layer=InternViTLayer,
            attention=InternViTAttention,
            qkv_bias=config.add_qkv_bias,
            qk_norm=qk_norm,
            drop_path_rates=rates,
            mlp_chunks=mlp_chunks,
            elementwise=elementwise,
        )
        self.encoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * config.num_layers, layer_norm=None),
            post_layer_norm=False,
            pg_collection=groups,
        )

    def positions(self, grid: int) -> Tensor:
        """Position table [1, grid^2 + 1, C], resized bicubically in float32 or wider for another tile size."""
        if grid == self.grid:
            return self.position_embedding
        class_row, patch_rows = self.position_embedding[:, :1], self.position_embedding[:, 1:]
        working = torch.promote_types(patch_rows.dtype, torch.float32)
        image = (
            patch_rows.to(working).reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        )  # [1, C, g, g]
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
        patch_rows = image.flatten(2).transpose(1, 2).to(patch_rows.dtype)  # [1, grid^2, C]
        return torch.cat([class_row, patch_rows], dim=1)

    def embed(self, pixels: Tensor) -> Tensor:
        """[n, 3, S, S] to [n, 1 + P, C]: class token, then patches row by row, positions added."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [n, C, g, g] -> [n, P, C]
        x = torch.cat([self.class_embedding.expand(len(pixels), -1, -1), patches], dim=1)
        return x + self.positions(pixels.shape[-1] // self.patch_size)

    def _needs_gradient_entry(self, x_snc: Tensor) -> bool:
        """Re-entrant recompute gives no gradients at all when its input needs none (frozen patches)."""
        recomputes = self.training and self.config.recompute_granularity is not None
        wanted = recomputes and torch.is_grad_enabled() and not x_snc.requires_grad
        # A tower that is frozen whole needs no graph, and must not keep one.
        return wanted and is_trained(self.encoder)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] to hidden states [n, 1 + P, C], class token first."""
        x_snc = self.embed(pixels).transpose(0, 1).contiguous()  # [n, 1+P, C] -> [1+P, n, C]
        if self._needs_gradient_entry(x_snc):
            x_snc = x_snc.detach().requires_grad_()
        return self.encoder(hidden_states=x_snc, attention_mask=None).transpose(0, 1)
