"""Mixture of experts of a decoder layer: a router in float32 with its losses, and experts that are saved one by one.

    rows [r, H] --ExpertRouter--> weights [r, E], choice [r, E] --mcore's all-to-all over ep--> experts --> rows [r, H]

mcore's layer, dispatcher and experts do the work. The router is ours for three reasons: its products are float32
(float64 in a float64 model) without Transformer Engine; its losses leave out padding and are normalised like the
cross entropy, by loss weights instead of token counts; and both are taken over the whole pack, whose tokens lie on the
tp x cp ranks.

Shape legend: r rows of this rank between layers, E experts, k experts of a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """How a router chooses, and what is added to the loss.

    Attributes:
        normalizes_top_k: a token's weights sum to one; false takes them from the softmax over all experts.
        aux_loss: strength of the load balancing loss; see `ExpertRouter`.
        z_loss: strength of the mean squared log-sum-exp of the logits.
        capacity_factor: an expert takes at most this many times its even share of a rank's rows; 0 takes all.
        num_sparse_layers: of the whole model; losses are means over them.
        has_bias: the logits have a bias, a parameter (GPT-OSS).
    """

    normalizes_top_k: bool
    aux_loss: float = 0.0
    z_loss: float = 0.0
    capacity_factor: float = 0.0
    num_sparse_layers: int = 1
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedRows:
    """What a router must know of a micro batch beyond the rows.

    Attributes:
        is_token: bool [r], false for padding, which takes no part in losses and counts.
        weight: [], loss weight of the whole pack; its share of the step's loss.
    """

    is_token: Tensor
    weight: Tensor


@dataclass(kw_only=True, eq=False)
class RouterCounts:
    """Sums over the micro batches of a step, over all tokens of each pack; the same on the ranks that share a pack.

    Attributes:
        tokens: float64 [E], tokens that chose each expert.
        dropped: float64 [], choices that found their expert full.
        aux_loss: float64 [], load balancing loss of each pack, without its strength, times the pack's weight.
        z_loss: float64 [], the same of the z-loss.
    """

    tokens: Tensor
    dropped: Tensor
    aux_loss: Tensor
    z_loss: Tensor

    @classmethod
    def zero(cls, num_experts: int, device: torch.device) -> RouterCounts:
        """Before the first micro batch."""
        sums = torch.zeros(num_experts + 3, dtype=torch.float64, device=device)
        return cls(tokens=sums[:-3], dropped=sums[-3], aux_loss=sums[-2], z_loss=sums[-1])


class _AddLoss(torch.autograd.Function):
    """The input unchanged; its backward also starts the backward of a loss, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype, ctx.device = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=ctx.dtype, device=ctx.device)


def _itself(x: Tensor) -> Tensor:
    return x


class ExpertRouter(TopKRouter):
    """Chooses k experts for each row.

        logits = rows @ weight^T (+ bias) weights = softmax over the k largest     (or of the softmax over all)
        aux = E * sum_e f_e p_e           f_e share of tokens that chose e (sums to k), p_e mean probability
        z   = mean over tokens of (log sum exp logits)^2

    The load balancing loss is that of transformers' Qwen3-MoE for one layer (Switch Transformer, arXiv 2101.03961,
    eq. 4, times k); a model's loss is the mean over its sparse layers, so that `router_aux_loss_coef` keeps its
    strength. f and p are taken over the whole pack. Added to the step's loss is

        sum over packs of weight * (aux_loss * aux + z_loss * z) / sum of weights

    Args:
        config: mcore's configuration of the decoder.
        pg_collection: groups of the decoder.
        settings: see `RouterSettings`.
        sum_over_pack: port; sum in place over the ranks that share a pack's tokens. No gradient passes through it.

    Attributes:
        routed: of the micro batch that runs next; the layer sets it.
        choice_bias: float32 [E], added to the probabilities when experts are chosen, and only then; None is without.
        counts: what happened since `counts` was last replaced, in training only.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        pg_collection: Any,
        settings: RouterSettings,
        sum_over_pack: Callable[[Tensor], Tensor] = _itself,
        **_of_other_versions: Any,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        if settings.has_bias:  # mcore has one where all linears of the decoder do, and then no etp
            self.bias = torch.nn.Parameter(torch.empty(self.num_experts, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.settings = settings
        self.sum_over_pack = sum_over_pack
        self.routed: RoutedRows | None = None
        self.counts: RouterCounts | None = None
        self.choice_bias: Tensor | None = (
            None  # no buffer: it stays float32, and is stored with the run's state
        )

    def forward(self, rows: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """[s, b, H] to weights [r, E], 0 where an expert is not chosen, and the choice, bool [r, E]."""
        logits = self.gating(rows.reshape(-1, rows.shape[-1]))
        weights, wanted = self._choose(logits)
        choice = wanted
        if self.settings.capacity_factor:
            weights, choice = apply_router_token_dropping(
                weights, wanted, router_topk=self.topk, capacity_factor=self.settings.capacity_factor
            )
        if self.training and torch.is_grad_enabled() and self.routed is not None:
            weights = self._with_losses(weights, logits, wanted=wanted, choice=choice)
        return weights, choice

    def gating(self, rows: Tensor) -> Tensor:
        """[r, H] to logits [r, E], in float32 or better."""
        working = torch.promote_types(rows.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(working)
        return F.linear(rows.to(working), self.weight.to(working), bias)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.choice_bias is None:
            values, experts = logits.topk(self.topk, dim=-1)
        else:
            experts = (logits.detach().softmax(-1) + self.choice_bias).topk(self.topk, dim=-1).indices
            values = logits.gather(1, experts)
        is_normal = self.settings.normalizes_top_k
        chosen = values.softmax(-1) if is_normal else logits.softmax(-1).gather(1, experts)
        weights = torch.zeros_like(logits).scatter(1, experts, chosen)
        choice = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        return weights, choice

    def _with_losses(self, weights: Tensor, logits: Tensor, *, wanted: Tensor, choice: Tensor) -> Tensor:
        """The weights, whose backward also brings the losses' gradients; and everything counted."""
        assert self.routed is not None
        is_token, settings = self.routed.is_token, self.settings
        dropped = ((wanted & ~choice) & is_token[:, None]).sum()
        counts = torch.cat([(wanted & is_token[:, None]).sum(0), torch.stack([is_token.sum(), dropped])])
        local = self.sum_over_pack(counts.double())
        tokens, num_tokens = local[:-2], local[-2].clamp(min=1.0)
        probabilities = (logits.softmax(-1) * is_token[:, None]).sum(0)
        # This rank's share of either loss: the shares of all ranks of the pack add up to it.
        share = self.token_share(tokens, num_tokens).to(logits.dtype) / num_tokens.to(logits.dtype)
        aux = self.num_experts * (share * probabilities).sum()
        z = (logits.logsumexp(-1).square() * is_token).sum() / num_tokens.to(logits.dtype)
        self._count(tokens, local[-1], aux, z)
        if not settings.aux_loss and not settings.z_loss:
            return weights
        factor = self.routed.weight.to(logits.dtype) / settings.num_sparse_layers
        return _AddLoss.apply(weights, (settings.aux_loss * aux + settings.z_loss * z) * factor)

    def token_share(self, tokens: Tensor, num_tokens: Tensor) -> Tensor:
        """f of the load balancing loss, float64 [E]: share of the pack's tokens that chose each expert.

        Args:
            tokens: float64 [E], tokens of the pack that chose each expert in this layer.
            num_tokens: float64 [], tokens of the pack, at least 1.
        """
        return tokens / num_tokens

    def _count(self, tokens: Tensor, dropped: Tensor, aux: Tensor, z: Tensor) -> None:
        assert self.routed is not None
        if self.counts is None:
            self.counts = RouterCounts.zero(self.num_experts, tokens.device)
        losses = self.sum_over_pack(torch.stack([aux.detach(), z.detach()]).double())
        self.counts.tokens += tokens
        self.counts.dropped += dropped
        self.counts.aux_loss += losses[0] * self.routed.weight
        self.counts.z_loss += losses[1] * self.routed.weight


class SequentialExperts(SequentialMLP):
    """mcore's experts, one MLP after the other, each of which is saved under its own number.

    mcore stacks the experts of a layer into one tensor; here an expert's keys are those of a plain MLP, so that the
    names table, import and export treat it as one.
    """

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Shards of this rank's experts under `{prefix}{number of the expert}.`."""
        first = self.ep_group.rank() * self.num_local_experts
        shards: dict[str, Any] = {}
        for i, expert in enumerate(self.local_experts):
            local_prefix = f"{prefix}local_experts.{i}."
            found = expert.sharded_state_dict(local_prefix, sharded_offsets, metadata)
            replace_prefix_for_sharding(found, local_prefix, f"{prefix}{first + i}.")
            for shard in found.values():
                # Copies lie on the ranks of the experts' own data parallel group.
                shard.replica_id = (*shard.replica_id[:2], self.dp_group.rank())
            shards.update(found)
        return shards
