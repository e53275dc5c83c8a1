"""A tower with a pyramid (PIIP) in plain PyTorch, from Hugging Face names: that part of `verify-numerics`.

    every branch:   vision_embedding, vision_layer of the plain reference, with the branch's own names
    after interval i of I, whose last layer is number ceil(i L / I) of L:
        for each pair of neighbours, the finest first:   p = A y + a, q = B x + b     both from the old x, y
            x <- J(x, p)    y <- J(y, q)
        J(x, p):  x1 = x + g_a * D(norm(x), norm(p))     x2 = x1 + g_f * F(norm(x1))
    readout `llava`:  sum over branches of  W2 gelu(norm(W1 R x + b1)) + b2     R: bilinear to the grid of the tokens

Written from the formulas, with four corners gathered by index in place of `grid_sample`; shares no modelling code with
`models/piip`. Weights are read when they are used.

Shape legend: n tiles, N = h*w patches of a branch, C its channels; primes are those of its neighbour; H heads, P
points, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_v2pe.config.arch.pyramid import PyramidArchitecture
from megatron_v2pe.verification.numerics.captured import EMBEDDING, TOWER, interaction_stage, vision_stage
from megatron_v2pe.verification.numerics.reference_model import (
    ReadTensor,
    ReferenceModel,
    written_out_attention,
)

_NORM_EPS, _READOUT_EPS, _GROUPS = 1e-6, 1e-5, 32
_PREFIX = "vision_model.piip."
Grid = tuple[int, int]


def pyramid_stages(reference: ReferenceModel, tiles: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a tower's stages.

    Args:
        reference: of the whole model; its weights are the large branch's.
        tiles: normalised pixels [n, 3, S_b, S_b] of every branch, the large one first.
    """
    pyramid = reference.arch.pyramid
    assert pyramid is not None
    towers = [reference, *(_branch(reference, index) for index in range(len(pyramid.branches)))]
    states = [tower.vision_embedding(image) for tower, image in zip(towers, tiles, strict=True)]
    yield EMBEDDING, states[0]
    grids = [
        (image.shape[-2] // tower.arch.vision.patch_size, image.shape[-1] // tower.arch.vision.patch_size)
        for tower, image in zip(towers, tiles, strict=True)
    ]
    intervals = pyramid.num_interactions
    for interval in range(intervals):
        for index, tower in enumerate(towers):
            depth = tower.arch.vision.num_layers
            first, last = (math.ceil(number * depth / intervals) for number in (interval, interval + 1))
            for layer in range(first, last):
                states[index] = tower.vision_layer(layer, states[index])
                if index == 0:
                    yield vision_stage(layer + 1), states[0]
        patches = _interacted(reference, pyramid, interval, [state[:, 1:] for state in states], grids)
        states = [torch.cat([state[:, :1], own], dim=1) for state, own in zip(states, patches, strict=True)]
        for index, own in enumerate(patches):
            yield interaction_stage(interval, index), own
    if pyramid.reads_all:
        yield TOWER, torch.cat([state[:, 1:].flatten(1) for state in states], dim=1)
    else:
        yield TOWER, states[0]


def pyramid_features(reference: ReferenceModel, rows: Tensor) -> Tensor:
    """Features [n * K, H] of the readout `llava`, from patches of all branches [n, sum_b N_b C_b].

    A cell of the new grid lies at ((j + 1/2) w / w' - 1/2) of the old one, clamped to it; each axis is a matrix of the
    shares of the two cells around that place.
    """
    pyramid, arch = reference.arch.pyramid, reference.arch
    assert pyramid is not None
    large = (arch.vision.hidden_size, arch.image_size // arch.vision.patch_size)
    shapes = [
        large,
        *((branch.hidden_size, branch.image_size // branch.patch_size) for branch in pyramid.branches),
    ]
    side, start = pyramid.token_side, 0
    total: Tensor | None = None
    for number, (width, own) in enumerate(shapes, start=1):
        image = rows[:, start : start + own * own * width].reshape(-1, own, own, width)
        start += own * own * width
        shares = _shares(own, side, dtype=rows.dtype)
        x = torch.einsum("ab,cd,nbdw->nacw", shares, shares, image).flatten(1, 2)  # [n, side*side, C]
        name = f"mm_projector.branch{number}"
        x = _linear(reference.read, f"{name}.1", x)
        if pyramid.readout_norm == "group":
            x = _group_normed(reference.read, f"{name}.3", x)
            x = _linear(reference.read, f"{name}.6", F.gelu(x))
        else:
            x = (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, unbiased=False, keepdim=True) + _READOUT_EPS
            ).sqrt()
            x = _linear(reference.read, f"{name}.5", F.gelu(x))
        total = x if total is None else total + x
    assert total is not None
    return total.flatten(0, 1)


def _shares(old: int, new: int, *, dtype: torch.dtype) -> Tensor:
    """Shares of `old` cells in each of `new` cells along one axis, [new, old]."""
    place = ((torch.arange(new, dtype=dtype) + 0.5) * old / new - 0.5).clamp(0, old - 1)
    distance = (place[:, None] - torch.arange(old, dtype=dtype)[None, :]).abs()
    return (1 - distance).clamp(min=0)


def _group_normed(read: ReadTensor, name: str, x: Tensor) -> Tensor:
    """32 groups of channels, each over all rows of a tile: [n, K, H]."""
    groups = x.unflatten(-1, (_GROUPS, -1))
    mean = groups.mean((1, 3), keepdim=True)
    variance = groups.var((1, 3), unbiased=False, keepdim=True)
    normed = ((groups - mean) / (variance + _READOUT_EPS).sqrt()).flatten(2)
    return normed * read(f"{name}.weight") + read(f"{name}.bias")


def _branch(reference: ReferenceModel, index: int) -> ReferenceModel:
    """A reference whose tower is one of the smaller branches."""
    pyramid = reference.arch.pyramid
    assert pyramid is not None
    branch, prefix = pyramid.branches[index], f"{_PREFIX}branches.{index}."
    arch = replace(reference.arch, vision=branch, image_size=branch.image_size, pyramid=None)

    def read(name: str) -> Tensor:
        return reference.read(prefix + name.removeprefix("vision_model."))

    return ReferenceModel(arch, read, is_v2pe=reference.is_v2pe, dtype=reference.dtype)


def _interacted(
    reference: ReferenceModel,
    pyramid: PyramidArchitecture,
    interval: int,
    patches: list[Tensor],
    grids: Sequence[Grid],
) -> list[Tensor]:
    """Patches [n, N_b, C_b] of all branches after an interaction."""
    found = list(patches)
    for pair in range(len(found) - 2, -1, -1):
        unit = f"{_PREFIX}interactions.{interval}.interaction_units_{pair + 1}{pair + 2}."
        x, y = found[pair], found[pair + 1]
        found[pair] = _direction(
            reference.read, f"{unit}branch2to1", pyramid, (x, y), (grids[pair], grids[pair + 1])
        )
        # Where the large branch alone is read, nothing reads the others after the last interaction.
        if pyramid.readout == "llava" or interval < pyramid.num_interactions - 1:
            found[pair + 1] = _direction(
                reference.read, f"{unit}branch1to2", pyramid, (y, x), (grids[pair + 1], grids[pair])
            )
    return found


def _direction(
    read: ReadTensor,
    name: str,
    pyramid: PyramidArchitecture,
    tokens: tuple[Tensor, Tensor],
    grids: tuple[Grid, Grid],
) -> Tensor:
    """J of the first tokens [n, N, C], reading the second ones [n, N', C']."""
    x, other = tokens
    if pyramid.projection:
        other = _linear(read, f"{name}_proj", other)
    own = f"{name}_injector."
    norm: Callable[[str, Tensor], Tensor] = lambda _norm, rows: rows  # noqa: E731
    if pyramid.norm:

        def norm(which: str, rows: Tensor) -> Tensor:
            weight, bias = (read(f"{own}{which}_norm.{kind}") for kind in ("weight", "bias"))
            return F.layer_norm(rows, rows.shape[-1:], weight, bias, _NORM_EPS)

    attention = _deformable if pyramid.attention == "deformable" else _dense
    x = x + read(f"{own}ca_gamma") * attention(
        read, f"{own}attn.", pyramid, (norm("query", x), norm("feat", other)), grids
    )
    hidden = _linear(read, f"{own}ffn.fc1", norm("ffn", x))
    image = hidden.transpose(1, 2).unflatten(2, grids[0])
    weight, bias = (read(f"{own}ffn.dwconv.dwconv.{kind}") for kind in ("weight", "bias"))
    image = F.conv2d(image, weight, bias, padding=1, groups=len(weight))
    added = _linear(read, f"{own}ffn.fc2", F.gelu(image.flatten(2).transpose(1, 2)))
    return x + read(f"{own}cffn_gamma") * added


def _linear(read: ReadTensor, name: str, x: Tensor) -> Tensor:
    return F.linear(x, read(f"{name}.weight"), read(f"{name}.bias"))


def _deformable(
    read: ReadTensor,
    name: str,
    pyramid: PyramidArchitecture,
    tokens: tuple[Tensor, Tensor],
    grids: tuple[Grid, Grid],
) -> Tensor:
    """Each head of each query reads P places of the value map: [n, N, C], [n, N', C'] to [n, N, C]."""
    query, feature = tokens
    (rows, columns), (value_rows, value_columns) = grids
    heads, points = pyramid.heads, pyramid.points
    value = _linear(read, f"{name}value_proj", feature).unflatten(-1, (heads, -1))  # [n, N', H, d]
    offsets = _linear(read, f"{name}sampling_offsets", query).unflatten(-1, (heads, points, 2))
    weights = _linear(read, f"{name}attention_weights", query).unflatten(-1, (heads, points)).softmax(-1)
    number = torch.arange(rows * columns, dtype=query.dtype)
    x = (
        number % columns + 0.5
    ) / columns * value_columns - 0.5  # a cell's centre, in cells of the value grid
    y = (number // columns + 0.5) / rows * value_rows - 0.5
    at_x, at_y = (
        x[None, :, None, None] + offsets[..., 0],
        y[None, :, None, None] + offsets[..., 1],
    )  # [n, N, H, P]
    read_there = _corners(value, at_x, at_y, (value_rows, value_columns))
    mixed = (read_there * weights[..., None]).sum(-2)  # [n, N, H, P, d] -> [n, N, H, d]
    return _linear(read, f"{name}output_proj", mixed.flatten(2))


def _corners(value: Tensor, x: Tensor, y: Tensor, grid: Grid) -> Tensor:
    """Values [n, N', H, d] at places (x, y) [n, N, H, P] in cells: bilinear, zero outside; [n, N, H, P, d]."""
    rows, columns = grid
    flat = value.transpose(1, 2)  # [n, H, N', d]
    total = None
    for corner_x in (x.floor(), x.floor() + 1):
        for corner_y in (y.floor(), y.floor() + 1):
            share = (1 - (x - corner_x).abs()) * (1 - (y - corner_y).abs())
            inside = (corner_x >= 0) & (corner_x < columns) & (corner_y >= 0) & (corner_y < rows)
            cell = (corner_y.clamp(0, rows - 1) * columns + corner_x.clamp(0, columns - 1)).long()
            index = cell.transpose(1, 2).flatten(2)  # [n, H, N P]
            found = flat.gather(2, index[..., None].expand(-1, -1, -1, flat.shape[-1]))
            found = found.unflatten(2, cell.shape[1::2]).transpose(1, 2)  # [n, N, H, P, d]
            part = found * (share * inside)[..., None]
            total = part if total is None else total + part
    assert total is not None
    return total


def _dense(
    read: ReadTensor,
    name: str,
    pyramid: PyramidArchitecture,
    tokens: tuple[Tensor, Tensor],
    _grids: tuple[Grid, Grid],
) -> Tensor:
    """Every patch to every patch; queries, keys and values without bias."""
    query, feature = tokens
    q, k, v = (
        F.linear(rows, read(f"{name}w{kind}.weight")).unflatten(-1, (pyramid.heads, -1)).transpose(1, 2)
        for kind, rows in (("q", query), ("k", feature), ("v", feature))
    )
    return _linear(
        read, f"{name}proj", written_out_attention(q, k, v, is_causal=False).transpose(1, 2).flatten(2)
    )
