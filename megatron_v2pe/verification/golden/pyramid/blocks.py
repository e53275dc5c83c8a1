"""The PIIP release's kinds of branches as functions of a dictionary of weights under the release's names.

DeiT, InternViT-6B, "augreg" (InternViT-6B's class with LayerNorm) and Hugging Face's CLIP. They exist to put this
package's interactions into the recorded models; the branches that train are `models.vision.InternViT`.

Shape legend: n images, N patches (h*w), T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.models.piip.geometry import Grid, map_to_tokens, resize_positions

Weights = Mapping[str, Tensor]
EPS = 1e-6
CLIP_EPS = 1e-5
Class = Literal["none", "without_position", "with_position"]


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch of a recorded model.

    Attributes:
        prefix: of its weights, such as `branch1.`.
        kind: whose names and order of operations it has.
        size: pixels of a square input's side.
        patch: pixels of a patch's side.
        depth: layers.
        heads: attention heads.
        class_token: whether it has one and whether a row of positions is added to it.
        windows: side of the attention windows of each layer, 0 for attention over the whole image.
        stops: layers after which each interval ends.
    """

    prefix: str
    kind: Literal["deit", "intern", "clip"]
    size: int
    patch: int
    depth: int
    heads: int
    class_token: Class
    windows: tuple[int, ...]
    stops: tuple[int, ...]


def embed(weights: Weights, branch: Branch, pixels: Tensor) -> tuple[Tensor, Grid]:
    """Pixels [n, 3, H, W] to tokens [n, T, C] and the grid of the patches."""
    if branch.kind == "clip":
        return _embed_clip(weights, branch, pixels)
    p = branch.prefix
    kernel, bias = weights[f"{p}patch_embed.proj.weight"], weights[f"{p}patch_embed.proj.bias"]
    image = F.conv2d(pixels, kernel, bias, stride=branch.patch)
    grid = (image.shape[-2], image.shape[-1])
    table = weights[f"{p}pos_embed"]
    has_class_row = branch.kind == "intern"
    class_row, rows = (table[:, :1], table[:, 1:]) if has_class_row else (None, table)
    x = map_to_tokens(image) + resize_positions(rows, grid)
    if branch.class_token == "none":
        return x, grid
    token = weights[f"{p}cls_token"]
    if branch.class_token == "with_position" and class_row is not None:
        token = token + class_row
    return torch.cat([token.expand(len(x), -1, -1), x], dim=1), grid


def _embed_clip(weights: Weights, branch: Branch, pixels: Tensor) -> tuple[Tensor, Grid]:
    p = f"{branch.prefix}clip_model."
    image = F.conv2d(pixels, weights[f"{p}embeddings.patch_embedding.weight"], stride=branch.patch)
    grid = (image.shape[-2], image.shape[-1])
    table = weights[f"{p}embeddings.position_embedding.weight"][None]
    token = weights[f"{p}embeddings.class_embedding"].expand(len(image), 1, -1) + table[:, :1]
    x = torch.cat([token, map_to_tokens(image) + resize_positions(table[:, 1:], grid)], dim=1)
    return _norm(weights, f"{p}pre_layrnorm", x, CLIP_EPS), grid


def run_block(weights: Weights, branch: Branch, layer: int, x: Tensor, grid: Grid) -> Tensor:
    """One layer: tokens [n, T, C] to the same shape."""
    if branch.kind == "clip":
        return _clip_block(weights, f"{branch.prefix}clip_model.encoder.layers.{layer}.", branch, x)
    p = f"{branch.prefix}blocks.{layer}."
    attended = _attention(weights, p, branch, layer, _norm(weights, f"{p}norm1", x, EPS), grid)
    x = x + attended * _scale(weights, p, 1)
    hidden = F.gelu(_linear(weights, f"{p}mlp.fc1", _norm(weights, f"{p}norm2", x, EPS)))
    return x + _linear(weights, f"{p}mlp.fc2", hidden) * _scale(weights, p, 2)


def _scale(weights: Weights, p: str, number: int) -> Tensor | float:
    """LayerScale under either name, or 1."""
    for name in (f"{p}gamma_{number}", f"{p}ls{number}.gamma"):
        if name in weights:
            return weights[name]
    return 1.0


def _attention(weights: Weights, p: str, branch: Branch, layer: int, x: Tensor, grid: Grid) -> Tensor:
    window = branch.windows[layer]
    if not window:
        mixed = _attend(weights, p, _linear(weights, f"{p}attn.qkv", x), branch.heads)
        return _linear(weights, f"{p}attn.proj", mixed)
    n, _, _ = x.shape
    if branch.kind == "deit":  # pads after the projection: keys of padding are 0
        qkv, padded = _pad(_linear(weights, f"{p}attn.qkv", x), grid, window)
    else:  # pads before it: keys of padding are the bias
        x, padded = _pad(x, grid, window)
        qkv = _linear(weights, f"{p}attn.qkv", x)
    rows, columns = padded[0] // window, padded[1] // window
    qkv = qkv.view(n, rows, window, columns, window, -1).transpose(2, 3).reshape(-1, window**2, qkv.shape[-1])
    mixed = _attend(weights, p, qkv, branch.heads).view(n, rows, columns, window, window, -1)
    mixed = (
        mixed.transpose(2, 3).reshape(n, *padded, -1)[:, : grid[0], : grid[1]].reshape(n, num_cells(grid), -1)
    )
    return _linear(weights, f"{p}attn.proj", mixed)


def num_cells(grid: Grid) -> int:
    """Cells of a grid."""
    return grid[0] * grid[1]


def _pad(x: Tensor, grid: Grid, window: int) -> tuple[Tensor, Grid]:
    """[n, h*w, C] to [n, H, W, C] with zeros below and on the right, H and W multiples of the window."""
    height, width = (-(-side // window) * window for side in grid)
    image = x.unflatten(1, grid)
    return F.pad(image, (0, 0, 0, width - grid[1], 0, height - grid[0])), (height, width)


def _attend(weights: Weights, p: str, qkv: Tensor, heads: int) -> Tensor:
    """[q | k | v] of [m, t, 3C] to [m, t, C]; queries and keys normalised over the full width where it has norms."""
    q, k, v = qkv.chunk(3, dim=-1)
    if f"{p}attn.q_norm.weight" in weights:
        q = _norm(weights, f"{p}attn.q_norm", q, EPS)
        k = _norm(weights, f"{p}attn.k_norm", k, EPS)
    return _heads_attention(q, k, v, heads)


def _heads_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _clip_block(weights: Weights, p: str, branch: Branch, x: Tensor) -> Tensor:
    y = _norm(weights, f"{p}layer_norm1", x, CLIP_EPS)
    q, k, v = (_linear(weights, f"{p}self_attn.{name}_proj", y) for name in "qkv")
    x = x + _linear(weights, f"{p}self_attn.out_proj", _heads_attention(q, k, v, branch.heads))
    hidden = _linear(weights, f"{p}mlp.fc1", _norm(weights, f"{p}layer_norm2", x, CLIP_EPS))
    return x + _linear(weights, f"{p}mlp.fc2", hidden * torch.sigmoid(1.702 * hidden))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if bias is None:
        return F.rms_norm(x, weight.shape, None, eps) * weight
    return F.layer_norm(x, weight.shape, weight, bias, eps)
