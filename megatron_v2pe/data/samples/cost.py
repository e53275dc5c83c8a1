"""What a pack costs, so that ranks can be given equal shares: one number, in units of one text token's linears.

    cost = tokens + square * sum(document length^2) + tile * tiles

All three come from the operations of forward and backward (6 per weight and token, causal attention half a square; a
frozen tower has no backward), divided by those of the decoder's linears for one token:

    square = layers * heads * head_dim / P      1 / 30,720 for InternLM2-2B: attention costs as much at 30,720 tokens
    tile   = tower and projector / (6 * P)      about 207 tokens for InternViT-300M beside it

Operations stand for time; kernels of different efficiency shift the weights, which `config.flops` does not know either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.flops import (
    TRAINING,
    attention_flops,
    decoder_linear_parameters,
    projector_flops,
    tower_flops,
)
from megatron_v2pe.v2pe.layout import Int64Array


@dataclass(frozen=True, kw_only=True)
class PackCost:
    """Coefficients of the cost.

    Attributes:
        square: of the sum of squared document lengths.
        tile: of the number of tiles.
    """

    square: float
    tile: float

    def of_samples(self, num_tokens: Int64Array, num_tiles: Int64Array) -> Any:
        """Cost of each sample as a document of a pack, float64 [n]; a pack costs the sum."""
        tokens = np.asarray(num_tokens, dtype=np.float64)
        return tokens + self.square * tokens**2 + self.tile * np.asarray(num_tiles, dtype=np.float64)


NO_COST = PackCost(square=0.0, tile=0.0)  # tokens alone


def pack_cost(arch: InternVLArchitecture, *, trains_vision: bool) -> PackCost:
    """Coefficients for a checkpoint.

    Args:
        arch: of the checkpoint.
        trains_vision: gradients pass through the vision tower.
    """
    token = 2 * TRAINING * decoder_linear_parameters(arch)
    passes = TRAINING if trains_vision else 1.0
    tile = passes * tower_flops(arch, 1) + TRAINING * projector_flops(arch, 1)
    return PackCost(square=TRAINING * attention_flops(arch, [1]) / token, tile=tile / token)
