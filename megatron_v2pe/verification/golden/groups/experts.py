"""Routers of a mixture of experts: logits, tokens per expert, and the load balancing loss of each layer.

Logits are compared at one rank only; the counts are of the whole pack in every layout. The recorded `aux_loss` joins
all layers before it multiplies; the loss here is a mean over layers (docs/decisions/0122), so the layers' own values
are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.assembly.router_counts import RouterTotals
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.verification.golden.cases import Case
from megatron_v2pe.verification.golden.rows import Row, compared, equal

AUX_LOSS_ATOL = 1e-5  # FORMAT, "Suggested"


class RecordedLogits:
    """Logits of every router of a model while the block runs, by layer."""

    def __init__(self, model: InternVL) -> None:
        self._routers = {
            layer.layer_number - 1: layer.mlp.router
            for layer in model.language.decoder.layers
            if layer.is_moe_layer
        }
        self.by_layer: dict[int, Tensor] = {}

    def __enter__(self) -> RecordedLogits:
        for number, router in self._routers.items():
            router.gating = self._recording(number, type(router).gating.__get__(router))
        return self

    def __exit__(self, *_error: Any) -> None:
        for router in self._routers.values():
            del router.gating

    def _recording(self, number: int, gating: Any) -> Any:
        def run(rows: Tensor) -> Tensor:
            logits = gating(rows)
            self.by_layer[number] = logits.detach()
            return logits

        return run


def logit_rows(name: str, case: Case, logits: dict[int, Tensor], *, tolerance: float) -> Iterator[Row]:
    """Router logits of each sparse layer, of one pack without padding."""
    for layer, values in logits.items():
        quantity = f"router_logits_{layer}"
        if case.file.has(f"{case.name}/{quantity}"):
            error = float((values.cpu() - case.wanted(quantity)).abs().max())
            yield compared(name, quantity, error=error, tolerance=tolerance)


def count_rows(name: str, case: Case, totals: RouterTotals, *, weight: float, copies: int) -> Iterator[Row]:
    """Tokens per expert and load balancing losses.

    Args:
        name: of the case.
        case: what was run.
        totals: of one step on the case's pack.
        weight: loss weight of the pack.
        copies: data parallel ranks, each of which ran the pack.
    """
    wanted_tokens = case.values.get("tokens_per_expert", {})
    for index, layer in enumerate(totals.layers):
        tokens = (totals.tokens[index] / copies).tolist()
        if str(layer) in wanted_tokens:
            wanted = wanted_tokens[str(layer)]
            detail = f"{tokens}, expected {wanted}"
            yield equal(name, f"tokens_per_expert_{layer}", is_equal=tokens == wanted, detail=detail)
    wanted_losses = case.values.get("aux_loss_per_layer")
    if wanted_losses is not None:
        losses = totals.aux_loss / (copies * weight)
        wanted = torch.tensor(_in_order(wanted_losses), dtype=torch.float64)
        error = float((losses - wanted).abs().max())
        yield compared(name, "aux_loss_per_layer", error=error, tolerance=AUX_LOSS_ATOL)


def _in_order(values: Any) -> list[float]:
    """Values of the sparse layers, from a list or from {layer: value}."""
    return [values[key] for key in sorted(values, key=int)] if isinstance(values, dict) else list(values)
