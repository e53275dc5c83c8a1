"""Routers of a mixture of experts: logits, tokens per expert, and the load balancing loss of each layer.

Logits are compared at one rank only; the counts are of the whole pack in every layout. The loss here is a mean over
layers (docs/decisions/0122), so the layers' own values are compared (`aux_loss_per_layer`). The recorded `aux_loss` and
its gradients (`aux_grad`, `aux_grad_l2`) join all layers before they multiply:

    joint = E * sum_e f_e p_e = mean over layers of E * sum_e f_e p_{layer,e},   f_e and p_e over all layers' tokens

f has no gradient, so the pack runs a second time with the routers' f replaced by that of all layers (`JointShares`),
and without labels, so that nothing but this loss has a gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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


class JointShares:
    """Routers at strength 1, whose f is that of all layers, while it is entered.

    Args:
        model_chunks: bare, of this rank.
        totals: of the same pack; f is taken from its tokens.
    """

    def __init__(self, model_chunks: Sequence[InternVL], totals: RouterTotals) -> None:
        layers = [layer for model_chunk in model_chunks for layer in model_chunk.language.decoder.layers]
        self._routers = [layer.mlp.router for layer in layers if layer.is_moe_layer]
        self._settings = [router.settings for router in self._routers]
        self._tokens = totals.tokens.sum(0)

    def __enter__(self) -> JointShares:
        for router in self._routers:
            router.settings = dataclasses.replace(router.settings, aux_loss=1.0, z_loss=0.0)
            share = self._tokens * (router.topk / self._tokens.sum())
            router.token_share = lambda tokens, _num_tokens, share=share: share.to(tokens.device)
        return self

    def __exit__(self, *_error: Any) -> None:
        for router, settings in zip(self._routers, self._settings, strict=True):
            router.settings = settings
            del router.token_share


def joint_loss_row(name: str, case: Case, totals: RouterTotals, *, weight: float, copies: int) -> Row:
    """The joint loss of a pack that ran within `JointShares`; arguments as of `count_rows`."""
    error = abs(float(totals.aux_loss.mean()) / (copies * weight) - float(case.values["aux_loss"]))
    return compared(name, "aux_loss", error=error, tolerance=AUX_LOSS_ATOL)


def logit_rows(
    name: str, case: Case, logits: dict[int, Tensor], *, num_chosen: int, tolerance: float
) -> Iterator[Row]:
    """Router logits of each sparse layer, of one pack without padding; how clear the closest choice was.

    Args:
        name: of the case.
        case: what was run.
        logits: [t, E] of each layer.
        num_chosen: experts of a token.
        tolerance: of a logit.
    """

    def margin(values: Tensor) -> float:
        """Smallest distance of the last chosen from the first rejected logit."""
        best = values.topk(num_chosen + 1, dim=-1).values
        return float((best[:, -2] - best[:, -1]).min())

    for layer, values in logits.items():
        quantity = f"router_logits_{layer}"
        if case.file.has(f"{case.name}/{quantity}"):
            error = float((values.cpu() - case.wanted(quantity)).abs().max())
            yield compared(name, quantity, error=error, tolerance=tolerance)
    if "min_router_margin" in case.values:
        error = abs(min(map(margin, logits.values())) - float(case.values["min_router_margin"]))
        yield compared(name, "min_router_margin", error=error, tolerance=2 * tolerance)


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
