"""Floating point operations that the model itself needs, by the usual convention.

A multiply-add counts as two; backward costs twice the forward; recomputation is not counted (model FLOPs, not
hardware FLOPs). Causal attention counts the half that is needed: a document of n tokens has n^2/2 pairs, and in layers
that see a window of w tokens n w - w^2/2. Figures that count the whole square (`full_attention`) are published too; at
256K tokens they are nearly twice as large. A window counts the same in both.

    decoder linears   6 * P_linear * tokens            attention   6 * layers * heads * head_dim * sum(n^2)
    head              6 * H * V * supervised tokens    vision      3 * tiles * (2 * P_vit * p + 4 * layers * p^2 * C)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.pyramid import PyramidArchitecture
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture

TRAINING = 3.0  # forward once, backward twice


@dataclass(frozen=True, kw_only=True)
class PackCounts:
    """What a pack asks of the model: padded document lengths, supervised tokens, tiles."""

    document_lengths: tuple[int, ...]
    supervised_tokens: int
    num_tiles: int


def decoder_linear_parameters(arch: InternVLArchitecture) -> int:
    """Weights of the decoder's linears that a token meets, embedding and head excluded."""
    return arch.language.active_weights


def linear_tokens(arch: InternVLArchitecture) -> int:
    """Length of a document whose causal attention costs as much as its linears; 30,720 for InternLM2-2B.

    Windowed layers cost the same for each token, as linears do, and count among them.
    """
    language = arch.language
    channels = language.num_heads * language.head_dim
    windows = 2 * language.num_windowed * channels * language.window
    whole = max(1, language.num_layers - language.num_windowed)
    return max(1, round((decoder_linear_parameters(arch) + windows) / (whole * channels)))


def attention_flops(
    arch: InternVLArchitecture, lengths: Iterable[int], *, full_attention: bool = False
) -> float:
    """Forward pass of causal attention: scores and values, 2 multiply-adds of head_dim for each pair of tokens."""
    language = arch.language
    half = 1.0 if full_attention else 0.5
    whole = windowed = 0.0
    for length in lengths:
        whole += half * float(length) ** 2
        windowed += window_pairs(length, language.window) if length > language.window else half * length**2
    pairs = (language.num_layers - language.num_windowed) * whole + language.num_windowed * windowed
    return 4.0 * language.num_heads * language.head_dim * pairs


def window_pairs(length: int, window: int) -> float:
    """Pairs of a document of at least `window` tokens, each of which sees `window` up to itself: n w - w^2/2."""
    return float(window) * length - 0.5 * float(window) ** 2


def tower_attention_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward pass of the bidirectional attention of the tower, its smaller branches included."""
    return sum(branch_attention_flops(vision, rows, num_tiles) for vision, rows in tower_branches(arch))


def tower_linear_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward pass of the tower's linears; the patch convolution, 1 in 1000 of them, is left out.

    With a pyramid: of every branch, and all of its interactions (linears, sampling, depthwise convolutions).
    """
    total = sum(branch_linear_flops(vision, rows, num_tiles) for vision, rows in tower_branches(arch))
    return total + interaction_flops(arch, num_tiles)


def branch_linear_flops(vision: VisionArchitecture, rows: int, num_tiles: int) -> float:
    """Forward pass of the linears of a branch's layers; `rows` are those of a tile, class token included."""
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_size
    return 2.0 * num_tiles * vision.num_layers * layer * rows


def branch_attention_flops(vision: VisionArchitecture, rows: int, num_tiles: int) -> float:
    """Forward pass of the attention of a branch's layers."""
    return 4.0 * num_tiles * vision.num_layers * rows**2 * vision.hidden_size


def tower_branches(arch: InternVLArchitecture) -> Iterator[tuple[VisionArchitecture, int]]:
    """Every branch of the tower, with the rows that it computes for a tile, class token included."""
    yield arch.vision, arch.patches_per_tile
    for branch in arch.pyramid.branches if arch.pyramid else ():
        yield branch, branch.num_positions


def interaction_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward pass of a pyramid's interactions; 0 without one."""
    pyramid = arch.pyramid
    if pyramid is None:
        return 0.0
    branches = [(vision.hidden_size, rows - 1) for vision, rows in tower_branches(arch)]
    total = 0.0
    for large, small in pairwise(branches):
        total += pyramid.num_interactions * _way_flops(pyramid, *large, *small)
        # Where nothing reads the smaller branches after the last interaction, its ways into them are not built.
        into_smaller = sum(pyramid.both_ways(interval) for interval in range(pyramid.num_interactions))
        total += into_smaller * _way_flops(pyramid, *small, *large)
    return num_tiles * total


def _way_flops(pyramid: PyramidArchitecture, width: int, rows: int, other: int, other_rows: int) -> float:
    """Forward pass of one direction of an interaction: into a branch of `width` channels and `rows` patches."""
    read = width if pyramid.projection else other
    total = other_rows * other * width if pyramid.projection else 0
    if pyramid.attention == "deformable":
        inner, places = int(width * pyramid.value_ratio), pyramid.heads * pyramid.points
        total += other_rows * read * inner + rows * width * (3 * places + inner)
        total += 5 * rows * inner * pyramid.points  # four corners and the weight of each sample
    else:
        total += 2 * rows * width * width + 2 * other_rows * read * width + 2 * rows * other_rows * width
    hidden = int(width * pyramid.ffn_ratio)
    return 2.0 * (total + rows * hidden * (2 * width + 9))


def projector_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward pass of the projector's two linears, of each branch where a pyramid's readout takes all of them."""
    hidden = arch.language.hidden_size
    if arch.reads_all_branches:
        widths = (vision.hidden_size for vision, _ in tower_branches(arch))
        weights = sum(width * hidden + hidden * hidden for width in widths)
        return 2.0 * num_tiles * weights * arch.tokens_per_tile
    return 2.0 * num_tiles * (arch.projector_width * hidden + hidden * hidden) * arch.tokens_per_tile


def tower_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward pass of the vision tower."""
    return tower_linear_flops(arch, num_tiles) + tower_attention_flops(arch, num_tiles)


def branch_flops(arch: InternVLArchitecture, num_tiles: int) -> dict[str, float]:
    """Forward and backward of each part of a tower with a pyramid; empty without one.

    `large` is the checkpoint's own tower, `branch_1` and on are the smaller networks, `interactions` what is between;
    `readout` is LLaVA's projector, where it takes the place of InternVL's.
    """
    if arch.pyramid is None:
        return {}
    parts = {
        f"branch_{index}" if index else "large": branch_linear_flops(vision, rows, num_tiles)
        + branch_attention_flops(vision, rows, num_tiles)
        for index, (vision, rows) in enumerate(tower_branches(arch))
    }
    parts["interactions"] = interaction_flops(arch, num_tiles)
    if arch.reads_all_branches:
        parts["readout"] = projector_flops(arch, num_tiles)
    return {name: TRAINING * flops for name, flops in parts.items()}


def vision_flops(arch: InternVLArchitecture, num_tiles: int) -> float:
    """Forward and backward of the tower and the projector for `num_tiles` tiles."""
    return TRAINING * (tower_flops(arch, num_tiles) + projector_flops(arch, num_tiles))


def step_flops(
    arch: InternVLArchitecture, packs: Iterable[PackCounts], *, full_attention: bool = False
) -> float:
    """Model FLOPs of forward and backward over packs (all ranks together)."""
    language = arch.language
    linear = 6.0 * decoder_linear_parameters(arch)
    head = 6.0 * language.hidden_size * language.vocab_size
    total = 0.0
    for pack in packs:
        total += linear * sum(pack.document_lengths)
        total += TRAINING * attention_flops(arch, pack.document_lengths, full_attention=full_attention)
        total += head * pack.supervised_tokens + vision_flops(arch, pack.num_tiles)
    return total
