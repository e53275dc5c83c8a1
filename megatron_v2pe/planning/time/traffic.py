"""Bytes that a rank sends in a step, by what they are for.

    tp       activations between the linears of a layer
    cp       keys, values and their gradients (p2p, all_gather), or heads (a2a)
    router   features of tiles to the owners of their tokens, and their gradients back
    pp       hidden states to the next stage, gradients to the one before
    dp       gradients once a step (reduce-scatter), weights once a step (all-gather), over dp * cp
    ep       rows to the ranks of their experts and back, and their gradients
    tp sum   gradients of parameters that tp ranks hold copies of

A collective over n ranks sends (n - 1) / n of its result per rank; an all-reduce twice that.
Shape legend: l tokens of a rank, r rows between layers, H hidden, q, k query and key channels of a rank; e bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.stages import ModelChunk


@dataclass(frozen=True, kw_only=True)
class ModelChunkTraffic:
    """Bytes sent by a rank for one micro batch in one model chunk.

    Attributes:
        tp_bytes: collectives of the decoder, of embedding and head, and of a split tower.
        cp_forward_bytes: attention, all forward passes (recomputed ones too).
        cp_backward_bytes: attention, backward.
        router_bytes: forward and backward.
        pp_bytes: forward and backward.
        ep_bytes: all-to-all of the experts, forward (recomputed too) and backward.
    """

    tp_bytes: float
    cp_forward_bytes: float
    cp_backward_bytes: float
    router_bytes: float
    pp_bytes: float
    ep_bytes: float = 0.0


def model_chunk_traffic(setting: Setting, model_chunk: ModelChunk) -> ModelChunkTraffic:
    """Traffic of one micro batch."""
    plan, hidden = setting.plan, setting.arch.language.hidden_size * setting.element_bytes
    forward, backward = cp_traffic_bytes(setting)
    windowed_forward, windowed_backward = window_traffic_bytes(setting)
    language, passes = setting.arch.language, forward_passes(setting)
    windowed = model_chunk.num_layers * language.num_windowed / language.num_layers
    whole = model_chunk.num_layers - windowed
    neighbours = (not model_chunk.is_first) + (not model_chunk.is_last)
    return ModelChunkTraffic(
        tp_bytes=tp_traffic_bytes(setting, model_chunk),
        cp_forward_bytes=passes * (whole * forward + windowed * windowed_forward),
        cp_backward_bytes=whole * backward + windowed * windowed_backward,
        router_bytes=router_bytes(setting) if model_chunk.is_first else 0.0,
        pp_bytes=neighbours * setting.rows * hidden if plan.pp > 1 else 0.0,
        ep_bytes=expert_bytes(setting, model_chunk),
    )


def expert_bytes(setting: Setting, model_chunk: ModelChunk) -> float:
    """All-to-all over ep, there and back, (ep - 1) / ep * n H e each way; once a forward pass and once in backward.

    n is the rows of the fullest rank (`Setting.routed_rows`): the others wait for it.
    """
    plan, language = setting.plan, setting.arch.language
    if language.experts is None or plan.ep == 1:
        return 0.0
    first = model_chunk.first_layer
    layers = range(first, first + model_chunk.num_layers)
    sparse = sum(language.is_sparse(layer) for layer in layers)
    each_way = (plan.ep - 1) / plan.ep * setting.routed_rows * language.hidden_size * setting.element_bytes
    return sparse * 2 * each_way * (forward_passes(setting) + 1)


def forward_passes(setting: Setting) -> int:
    """Forward passes of a decoder layer: twice when it is recomputed."""
    return 2 if setting.config.model.recompute == "full" else 1


def tp_traffic_bytes(setting: Setting, model_chunk: ModelChunk) -> float:
    """Collectives over tp; u = (tp - 1) / tp * l * H * e.

    A layer, forward: 2 all-reduces, or with sequence parallelism 2 all-gathers and 2 reduce-scatters: 4 u. Backward:
    4 u, and with sequence parallelism the inputs of the two column linears are gathered again: 6 u. Embedding and head:
    2 u each. A split tower: 2 all-reduces of its rows in a layer, forward and backward.
    """
    plan = setting.plan
    if plan.tp == 1:
        return 0.0
    ends = (plan.tp - 1) / plan.tp
    unit = ends * setting.tokens * setting.arch.language.hidden_size * setting.element_bytes
    layer = 4 * forward_passes(setting) + (6 if plan.sequence_parallel else 4)
    total = unit * (model_chunk.num_layers * layer + 2 * (model_chunk.is_first + model_chunk.is_last))
    if model_chunk.is_first and plan.tower_tp > 1:
        vision = setting.arch.vision
        rows = setting.tiles * setting.arch.patches_per_tile * vision.hidden_size * setting.element_bytes
        total += ends * rows * vision.num_layers * 4 * (2 if setting.has_gradients("vision") else 1)
    return total


def cp_traffic_bytes(setting: Setting) -> tuple[float, float]:
    """Attention of one layer over cp, (one forward pass, backward); B = 2 l k e, own keys and values.

    p2p and all_gather: forward (cp - 1) B; backward the keys again and their gradients, 2 (cp - 1) B (the native ring
    brings half of lower ranks' keys and gradients; the busiest rank is counted). a2a: queries, keys, values there and
    outputs back, (cp - 1) / cp * l (2 q + 2 k) e, in forward and in backward. Where documents lie on some of the ranks
    (`parallel.cp_sharding`), the keys of shared documents alone.
    """
    plan, language = setting.plan, setting.arch.language
    if plan.cp == 1:
        return 0.0, 0.0
    e = setting.element_bytes
    query = language.num_heads * language.head_dim // plan.tp
    key = language.kv_heads_of_rank(plan.tp) * language.head_dim
    if setting.config.parallel.cp_comm_type == "a2a":
        both = (plan.cp - 1) / plan.cp * setting.tokens * (2 * query + 2 * key) * e
        return both, both
    arriving = 2 * setting.received_rows * key * e
    return arriving, 2 * arriving


def window_traffic_bytes(setting: Setting) -> tuple[float, float]:
    """The same for a layer with a window of w tokens: the w - 1 keys before each of a rank's two ranges of a document.

    a2a gives such layers whole documents, as others.
    """
    language = setting.arch.language
    forward, backward = cp_traffic_bytes(setting)
    if not language.window or setting.config.parallel.cp_comm_type == "a2a":
        return forward, backward
    rows = 2 * (language.window - 1) * len(setting.pack.document_lengths)
    key = language.kv_heads_of_rank(setting.plan.tp) * language.head_dim
    arriving = 2 * rows * key * setting.element_bytes
    return min(forward, arriving), min(backward, 2 * arriving)


def router_bytes(setting: Setting) -> float:
    """Features of a rank's tiles that other ranks own, there and their gradients back: 2 (n - 1) / n * tiles K H e.

    With a split tower and sequence parallelism every tp rank receives the rows of its whole cp shard, and their
    gradients are summed over tp: an all-reduce of the visual rows.
    """
    plan, arch, e = setting.plan, setting.arch, setting.element_bytes
    ranks = plan.tile_ranks
    features = setting.tiles * arch.tokens_per_tile * arch.language.hidden_size * e
    total = 2 * (ranks - 1) / ranks * features
    if plan.sequence_parallel and not plan.shares_tiles_over_tp:
        total += 2 * (plan.tp - 1) / plan.tp * features
    return total


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Bytes sent by a rank once a step."""

    gradients_bytes: float
    weights_bytes: float
    tp_sum_bytes: float


def step_traffic(
    setting: Setting, *, gradients_bytes: int, weights_bytes: int, tp_summed: int
) -> StepTraffic:
    """The distributed optimizer's collectives over dp * cp, and the sum of copies over tp.

    Args:
        setting: the run.
        gradients_bytes: this rank's gradient buffers.
        weights_bytes: trained weights of this rank.
        tp_summed: numbers whose gradients are summed over tp (`rank_state.trained_numbers`).
    """
    sharing, tp = setting.plan.dp * setting.plan.cp, setting.plan.tp
    return StepTraffic(
        gradients_bytes=(sharing - 1) / sharing * gradients_bytes,
        weights_bytes=(sharing - 1) / sharing * weights_bytes,
        tp_sum_bytes=2 * (tp - 1) / tp * 4 * tp_summed,
    )
