"""What the routers of all layers counted, on every rank: tokens per expert, dropped choices, losses.

each layer's ExpertRouter.counts --one sum over the world--> RouterTotals --> metrics
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.models.layers.experts import RouterCounts
from megatron_v2pe.parallel.topology import Ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterTotals:
    """Sums over all packs of a step, for each sparse layer; on the host, the same on every rank.

    Attributes:
        layers: numbers of the sparse layers, 0-based.
        tokens: float64 [layers, E], tokens that chose each expert.
        dropped: float64 [layers], choices that found their expert full.
        aux_loss: float64 [layers], load balancing loss times the pack's weight, without its strength.
        z_loss: float64 [layers], z-loss times the pack's weight, without its strength.
    """

    layers: tuple[int, ...]
    tokens: Tensor
    dropped: Tensor
    aux_loss: Tensor
    z_loss: Tensor

    def numbers(self, weight_sum: float) -> dict[str, Any]:
        """Numbers of metrics.jsonl; a load is the tokens of an expert over the mean of its layer, 1 is even.

        Args:
            weight_sum: loss weight of the global batch.
        """
        loads = self.tokens.amax(1) / self.tokens.mean(1).clamp(min=1.0)
        busiest = int(loads.argmax())
        return {
            "aux_loss": float(self.aux_loss.mean()) / weight_sum,
            "z_loss": float(self.z_loss.mean()) / weight_sum,
            "expert_load_max": float(loads[busiest]),
            "expert_load_by_layer": {
                str(layer): round(load, 3) for layer, load in zip(self.layers, loads.tolist(), strict=True)
            },
            "busiest_layer": self.layers[busiest],
            "tokens_per_expert": {str(e): int(n) for e, n in enumerate(self.tokens[busiest].tolist())},
            "drop_rate": float(self.dropped.sum()) / max(float(self.tokens.sum()), 1.0),
        }


def take_router_totals(model_chunks: Sequence[InternVL], *, ranks: Ranks) -> RouterTotals | None:
    """Add up what was counted, and start anew; None for a model without experts. Collective.

    Args:
        model_chunks: bare, of this rank.
        ranks: this rank's place.
    """
    num_experts = model_chunks[0].config.num_moe_experts
    if num_experts is None:
        return None
    layers = [number for number, sparse in enumerate(model_chunks[0].config.moe_layer_freq) if sparse]
    sums = torch.zeros(len(layers), num_experts + 3, dtype=torch.float64, device=ranks.device)
    # The ranks that share a pack counted the same.
    is_counted = ranks.tp_rank == 0 and ranks.cp_rank == 0
    for model_chunk in model_chunks:
        for layer in model_chunk.language.decoder.layers:
            counts: RouterCounts | None = layer.mlp.router.counts if layer.is_moe_layer else None
            if counts is None:
                continue
            if is_counted:
                rest = torch.stack([counts.dropped, counts.aux_loss, counts.z_loss])
                sums[layers.index(layer.layer_number - 1)] += torch.cat([counts.tokens, rest])
            layer.mlp.router.counts = None
    dist.all_reduce(sums)
    tokens, dropped, aux_loss, z_loss = sums.cpu().split([num_experts, 1, 1, 1], dim=1)
    return RouterTotals(
        layers=tuple(layers),
        tokens=tokens,
        dropped=dropped.squeeze(1),
        aux_loss=aux_loss.squeeze(1),
        z_loss=z_loss.squeeze(1),
    )
