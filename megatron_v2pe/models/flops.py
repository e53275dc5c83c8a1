"""Floating point operations that the model itself needs, by the usual convention.

A multiply-add counts as two; backward costs twice the forward; recomputation is not counted (model FLOPs, not
hardware FLOPs). Causal attention counts the half that is needed: a document of n tokens has n^2/2 pairs.

    decoder linears   6 * P_linear * tokens            attention   6 * layers * heads * head_dim * sum(n^2)
    head              6 * H * V * supervised tokens    vision      3 * tiles * (2 * P_vit * p + 4 * layers * p^2 * C)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_v2pe.config.architecture import InternVLArchitecture


@dataclass(frozen=True, kw_only=True)
class PackCounts:
    """What a pack asks of the model: padded document lengths, supervised tokens, tiles."""

    document_lengths: tuple[int, ...]
    supervised_tokens: int
    num_tiles: int


def decoder_linear_parameters(arch: InternVLArchitecture) -> int:
    """Weights of the decoder's linears, embedding and head excluded."""
    language = arch.language
    hidden, kv = language.hidden_size, language.num_kv_heads * language.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv
    return language.num_layers * (attention + 3 * hidden * language.ffn_size)


def vision_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward and backward of the tower and the projector for `num_tiles` tiles."""
    vision, hidden = arch.vision, arch.language.hidden_size
    patches = (arch.image_size // vision.patch_size) ** 2 + 1
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_size
    tower = vision.num_layers * (2 * layer * patches + 4 * patches**2 * vision.hidden_size)
    shuffled = vision.hidden_size * round(1 / arch.downsample_ratio) ** 2
    projector = 2 * (shuffled * hidden + hidden * hidden) * arch.tokens_per_tile
    return 3.0 * num_tiles * (tower + projector)


def step_flops(arch: InternVLArchitecture, packs: Iterable[PackCounts]) -> float:
    """Model FLOPs of forward and backward over packs (all ranks together)."""
    language = arch.language
    linear = 6.0 * decoder_linear_parameters(arch)
    attention = 6.0 * language.num_layers * language.num_heads * language.head_dim
    head = 6.0 * language.hidden_size * language.vocab_size
    total = 0.0
    for pack in packs:
        total += linear * sum(pack.document_lengths)
        total += attention * sum(float(length) ** 2 for length in pack.document_lengths)
        total += head * pack.supervised_tokens + vision_flops(arch, pack.num_tiles)
    return total
