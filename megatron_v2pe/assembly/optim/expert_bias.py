"""Balancing experts by a bias of their choice: `moe.bias_rate`.

    tokens per expert of a step, all ranks --update--> bias of each sparse layer --put_expert_bias--> own routers

The rule of "Auxiliary-Loss-Free Load Balancing" (arXiv 2408.15664, algorithm 1): after each update of the weights

    bias_e += rate * sign(mean tokens of an expert - tokens of e)

The bias takes part in choosing experts alone; a token's weights come from its logits without it, so it has no gradient.
Every rank sees the counts of all layers, and keeps the whole table: any rank can write it, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_v2pe.assembly.router_counts import RouterTotals
from megatron_v2pe.models.internvl import InternVL

BiasTable = Mapping[str, Sequence[float]]
"""Number of a sparse layer, 0-based, to the bias of its experts, float32 values; as in `checkpoint.json`."""


class ExpertBias:
    """The table of a run, the same on every rank.

    Args:
        model_chunks: bare, of this rank; their routers follow the table.
        rate: how far a bias moves in a step; 0 keeps what a checkpoint brought.
    """

    def __init__(self, model_chunks: Sequence[InternVL], *, rate: float) -> None:
        self._model_chunks = model_chunks
        self._rate = rate
        self._values: dict[int, Tensor] = {}

    def load(self, table: BiasTable) -> None:
        """Continue from the table of a checkpoint; empty is no bias."""
        self._values = {
            int(layer): torch.tensor(values, dtype=torch.float32) for layer, values in table.items()
        }
        put_expert_bias(table, self._model_chunks)

    def update(self, totals: RouterTotals) -> None:
        """Move every bias towards even use of its layer's experts, by the tokens of the step that was applied."""
        if not self._rate:
            return
        for layer, tokens in zip(totals.layers, totals.tokens, strict=True):
            before = self._values.get(layer, torch.zeros(len(tokens)))
            self._values[layer] = before + self._rate * torch.sign(tokens.mean() - tokens).float()
        put_expert_bias(self.table(), self._model_chunks)

    def table(self) -> dict[str, list[float]]:
        """Plain values for `checkpoint.json`; json keeps float32 exactly."""
        return {str(layer): values.tolist() for layer, values in sorted(self._values.items())}

    def numbers(self) -> dict[str, float]:
        """Numbers of metrics.jsonl; none without a bias."""
        if not self._values:
            return {}
        return {"expert_bias_max": max(float(values.abs().max()) for values in self._values.values())}


def put_expert_bias(table: BiasTable, model_chunks: Sequence[InternVL]) -> None:
    """Give the routers of this rank the bias of their layers; one that the table does not name has none."""
    for model_chunk in model_chunks:
        for layer in model_chunk.language.decoder.layers:
            if layer.is_moe_layer:
                router, values = layer.mlp.router, table.get(str(layer.layer_number - 1))
                router.choice_bias = (
                    None
                    if values is None
                    else torch.tensor(values, dtype=torch.float32, device=router.weight.device)
                )
