"""InternVL2 in plain PyTorch, written for speed as a careful user would: the side that a training step races against.

    pixels --tower--> pixel shuffle --projector--> rows --spliced into--> embedding --decoder--> rows with a label
    --head--> loss

No megatron-core and nothing of this package: modules of torch.nn, scaled dot product attention for each document, sines
and cosines of a pack made once, logits of supervised tokens only. Queries, keys and values are one `Linear`, and so are
gate and up: the largest products that the structure allows.

Shape legend: t tokens, H hidden, h query heads, k key heads, d head dimension, n tiles, C vision channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the plain model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    patch: int
    patches_per_side: int
    rope_base: float
    norm_eps: float


class DecoderLayer(nn.Module):
    """RMSNorm, grouped causal attention, RMSNorm, SwiGLU."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.hidden // sizes.heads
        self.norm1 = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        self.qkv = nn.Linear(sizes.hidden, (sizes.heads + 2 * sizes.kv_heads) * width, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.norm2 = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        self.gate_up = nn.Linear(sizes.hidden, 2 * sizes.ffn, bias=False)
        self.down = nn.Linear(sizes.ffn, sizes.hidden, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], bounds: Sequence[int]) -> Tensor:
        """[t, H] to [t, H]; documents end at `bounds`."""
        x = x + self.attention(self.norm1(x), tables, bounds)
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)

    def attention(self, x: Tensor, tables: tuple[Tensor, Tensor], bounds: Sequence[int]) -> Tensor:
        """Causal attention within each document."""
        heads, kv_heads = self.sizes.heads, self.sizes.kv_heads
        projected = self.qkv(x).unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(0, 1)  # [h + 2k, t, d]
        query, key, value = projected.split([heads, kv_heads, kv_heads])
        query, key = rotated(query, tables), rotated(key, tables)
        parts = [
            F.scaled_dot_product_attention(
                *(each[None, :, start:end] for each in (query, key, value)), is_causal=True, enable_gqa=True
            )
            for start, end in pairwise(bounds)
        ]
        return self.out(torch.cat(parts, 2)[0].transpose(0, 1).flatten(1))


def rotated(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate [h, t, d] by the cosines and sines [t, d]."""
    first, second = x.chunk(2, -1)
    return x * tables[0] + torch.cat([-second, first], -1) * tables[1]


class VisionLayer(nn.Module):
    """LayerNorm, bidirectional attention, LayerNorm, MLP, each branch scaled."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.vision_hidden
        self.heads = sizes.vision_heads
        self.norm1 = nn.LayerNorm(width, 1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, P, C] to [n, P, C]."""
        projected = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [n, P, 3, heads, d]
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.out(attended) * self.scale1
        return x + self.down(F.gelu(self.up(self.norm2(x)))) * self.scale2


class PlainInternVL(nn.Module):
    """The whole model; `forward` gives the mean cross entropy of tokens with a label."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        vision, patches = sizes.vision_hidden, sizes.patches_per_side**2
        self.patches = nn.Conv2d(3, vision, sizes.patch, sizes.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, vision))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, vision))
        self.tower = nn.ModuleList(VisionLayer(sizes) for _ in range(sizes.vision_layers))
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * vision),
            nn.Linear(4 * vision, sizes.hidden),
            nn.GELU(),
            nn.Linear(sizes.hidden, sizes.hidden),
        )
        self.embedding = nn.Embedding(sizes.vocab, sizes.hidden)
        self.decoder = nn.ModuleList(DecoderLayer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden, sizes.norm_eps)
        self.head = nn.Linear(sizes.hidden, sizes.vocab, bias=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] to feature rows [n * K, H]."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.tower:
            x = layer(x)
        half = self.sizes.patches_per_side // 2
        x = x[:, 1:].unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return self.projector(x).flatten(0, 1)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [t, d] of positions [t], both halves alike."""
        width = self.sizes.hidden // self.sizes.heads
        powers = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = torch.outer(positions.double(), self.sizes.rope_base**-powers).repeat(1, 2)
        return angles.cos().float(), angles.sin().float()

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        bounds: Sequence[int],
        pixels: Tensor,
        slots: Tensor,
        *,
        all_rows: bool = False,
    ) -> Tensor:
        """Mean loss of one pack.

        Args:
            tokens: [t].
            labels: [t], shifted; -100 where there is none.
            positions: [t].
            bounds: where documents start, and the end of the last.
            pixels: [n, 3, S, S] normalised tiles.
            slots: [n * K], tokens that are visual.
            all_rows: logits of every token, as most people write it.
        """
        x = self.embedding(tokens).index_copy(0, slots, self.encode(pixels))
        tables = self.tables(positions)
        for layer in self.decoder:
            x = layer(x, tables, bounds)
        if all_rows:
            return F.cross_entropy(self.head(self.norm(x)), labels)
        supervised = (labels >= 0).nonzero().squeeze(1)
        return F.cross_entropy(self.head(self.norm(x[supervised])), labels[supervised])
