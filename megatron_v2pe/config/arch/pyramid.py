"""The pyramid of a PIIP model (`piip_config` of a config.json), and what it may be.

vision_config   the large branch, as in InternVL2
piip_config     smaller branches at more pixels of the same tile, interactions between neighbours, readout
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_v2pe.config.arch.section import Section
from megatron_v2pe.config.arch.vision_architecture import VisionArchitecture
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened

Readout = Literal["large", "llava"]
GROUPS = 32  # of the GroupNorm in LLaVA's projector


@dataclass(frozen=True, kw_only=True)
class PyramidArchitecture:
    """Smaller branches and interactions of a PIIP tower.

    Attributes:
        branches: in the order in which they neighbour: ever smaller networks at ever more pixels; `image_size` of each
            is what it sees of a tile.
        num_interactions: exchanges between neighbours; every branch runs as many intervals of layers.
        heads: of the attention between branches.
        points: that a head of deformable attention reads.
        value_ratio: channels of all heads together, as a share of the query's width.
        ffn_ratio: hidden channels of an interaction's feed-forward, as a share of the width.
        attention: deformable, or dense (every patch to every patch).
        norm: LayerNorm inside interactions.
        projection: bring the other branch to this branch's width first.
        drop_path: rate of an interaction's feed-forward while training.
        readout: what the language model gets: the `large` branch through InternVL's projector, or every branch through
            LLaVA's, one token for each cell of a grid.
        readout_norm: of `llava`, between its linears: GroupNorm over the whole map, or LayerNorm without parameters.
        readout_grid: of `llava`, cells on the side of that grid; 0 is the finest branch's.
    """

    branches: tuple[VisionArchitecture, ...]
    num_interactions: int
    heads: int = 16
    points: int = 4
    value_ratio: float = 0.5
    ffn_ratio: float = 0.25
    attention: Literal["deformable", "dense"] = "deformable"
    norm: bool = True
    projection: bool = True
    drop_path: float = 0.0
    readout: Readout = "large"
    readout_norm: Literal["group", "layer"] = "group"
    readout_grid: int = 0

    @property
    def reads_all(self) -> bool:
        """Whether the readout takes every branch's last hidden states; else only the large branch's are read."""
        return self.readout == "llava"

    @property
    def token_side(self) -> int:
        """Visual tokens on a tile's side, where `reads_all`."""
        return self.readout_grid or self.branches[-1].grid

    def both_ways(self, interval: int) -> bool:
        """Whether the interaction after an interval also changes the smaller branches: nothing may read them later."""
        return self.reads_all or interval < self.num_interactions - 1


def interval_stops(num_layers: int, num_intervals: int) -> tuple[int, ...]:
    """Layers after which each interval ends: as even as possible, longer ones first; the last one is num_layers."""
    return tuple(-(-(index + 1) * num_layers // num_intervals) for index in range(num_intervals))


def parse_pyramid(values: Section, large: VisionArchitecture, *, image_size: int) -> PyramidArchitecture:
    """Read a `piip_config` and check it against the large branch.

    Args:
        values: the object.
        large: the large branch.
        image_size: S, pixels of the large branch's tile.

    Raises:
        CheckpointError: a key is missing or unknown, or a rule of a pyramid is broken; names key, value, rule, way out.
    """
    rows = values.need("branches")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{values.path}: branches must be a list of at least one object")
    known = {
        "branches",
        "interactions",
        "deform_num_heads",
        "n_points",
        "deform_ratio",
        "cffn_ratio",
        "interact_attn_type",
        "norm_layer",
        "interaction_proj",
        "interaction_drop_path_rate",
        "readout",
        "readout_norm",
        "readout_grid",
    }
    values.refuse_unknown(known)
    readout = _parse_readout(values)
    pyramid = PyramidArchitecture(
        branches=tuple(
            _parse_branch(Section(row, f"{values.path}: branches[{index}]")) for index, row in enumerate(rows)
        ),
        num_interactions=values.whole("interactions", None),
        heads=values.whole("deform_num_heads", 16),
        points=values.whole("n_points", 4),
        value_ratio=_number(values, "deform_ratio", 0.5),
        ffn_ratio=_number(values, "cffn_ratio", 0.25),
        attention=values.choice("interact_attn_type", "deformable", ("deformable", "dense")),
        norm=values.choice("norm_layer", "ln", ("ln", "none")) == "ln",
        projection=values.choice("interaction_proj", True, (True, False)),
        drop_path=_number(values, "interaction_drop_path_rate", 0.0),
        readout=readout,
        readout_norm=_NORMS[values.choice("readout_norm", "gn", tuple(_NORMS))],
        readout_grid=values.whole("readout_grid", None) if "readout_grid" in values.values else 0,
    )
    check_pyramid(pyramid, large, image_size=image_size, path=values.path)
    return pyramid


_NORMS: dict[str, Literal["group", "layer"]] = {"gn": "group", "ln": "layer"}  # the release's names


def _parse_readout(values: Section) -> Readout:
    """`large` or `llava`; settings of the second are refused beside the first, where nothing would read them."""
    readout = values.get("readout", "large")
    if readout == "sum":
        raise CheckpointError(
            f"{values.path}: readout is 'sum', of which there is neither a released model nor recorded numbers, and "
            "whose proposal (features + u_b P_b(x_b)) leaves open what P_b is and on which grid it is added; "
            "use large, which keeps the tokens of a tile, or llava"
        )
    chosen: Readout = values.choice("readout", "large", ("large", "llava"))
    for key in ("readout_norm", "readout_grid"):
        if chosen == "large" and key in values.values:
            raise CheckpointError(
                f"{values.path}: {key} is given, but readout is 'large', which has InternVL's own projector and "
                "tokens; leave it out, or set readout to llava"
            )
    return chosen


def _number(values: Section, key: str, default: float) -> float:
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise CheckpointError(
            f"{values.path}: {key} is {shortened(value)}, but must be a number of at least 0"
        )
    return float(value)


def _parse_branch(row: Section) -> VisionArchitecture:
    known = {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
        "norm_type",
        "layer_norm_eps",
        "qkv_bias",
        "qk_normalization",
    }
    row.refuse_unknown(known)
    return VisionArchitecture(
        hidden_size=row.whole("hidden_size", None),
        num_layers=row.whole("num_hidden_layers", None),
        num_heads=row.whole("num_attention_heads", None),
        ffn_size=row.whole("intermediate_size", None),
        image_size=row.whole("image_size", None),
        patch_size=row.whole("patch_size", 16),
        norm_type=row.choice("norm_type", "layer_norm", ("layer_norm", "rms_norm")),
        norm_eps=float(row.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(row.get("qkv_bias", True)),
        qk_normalization=bool(row.get("qk_normalization", False)),
    )


def check_pyramid(
    pyramid: PyramidArchitecture, large: VisionArchitecture, *, image_size: int, path: str
) -> None:
    """Rules between a pyramid's sizes; see `parse_pyramid`."""
    towers = (large, *pyramid.branches)
    names = ["vision_config", *(f"{path}: branches[{index}]" for index in range(len(pyramid.branches)))]
    sizes = (image_size, *(branch.image_size for branch in pyramid.branches))
    for name, tower, size in zip(names, towers, sizes, strict=True):
        _check_tower(name, tower, size, pyramid, path)
    for index, name in enumerate(names[1:], start=1):
        parent, own = towers[index - 1], towers[index]
        if own.hidden_size > parent.hidden_size:
            raise CheckpointError(
                f"{name}.hidden_size is {own.hidden_size}, more than the {parent.hidden_size} of the branch before it; "
                "a pyramid has ever smaller networks at ever more pixels: reorder or narrow the branches"
            )
        if sizes[index] <= sizes[index - 1]:
            raise CheckpointError(
                f"{name}.image_size is {sizes[index]}, but must exceed the {sizes[index - 1]} of the branch before it; "
                "a branch that sees no more pixels adds cost and no detail"
            )
    finest = pyramid.branches[-1].grid
    if pyramid.readout_grid > finest:
        raise CheckpointError(
            f"{path}: readout_grid is {pyramid.readout_grid}, but must not exceed the {finest} cells on the side of "
            "the finest branch's grid: more tokens would repeat what is there"
        )
    if not 0 <= pyramid.drop_path < 1:
        raise CheckpointError(
            f"{path}: interaction_drop_path_rate is {pyramid.drop_path}, but must lie in [0, 1)"
        )


def _check_tower(
    name: str, tower: VisionArchitecture, size: int, pyramid: PyramidArchitecture, path: str
) -> None:
    if size % tower.patch_size:
        below, above = size - size % tower.patch_size, size + tower.patch_size - size % tower.patch_size
        raise CheckpointError(
            f"{name}.image_size is {size}, which its patch_size {tower.patch_size} does not divide; "
            f"use {below} or {above}"
        )
    if tower.hidden_size % tower.num_heads:
        raise CheckpointError(
            f"{name}.num_attention_heads is {tower.num_heads}, which does not divide its hidden_size "
            f"{tower.hidden_size}; change one of them"
        )
    if not 1 <= pyramid.num_interactions <= tower.num_layers:
        raise CheckpointError(
            f"{path}: interactions is {pyramid.num_interactions}, but must lie in 1..{tower.num_layers}, the layers of "
            f"{name}: every interval between interactions needs a layer of every branch"
        )
    share = pyramid.value_ratio if pyramid.attention == "deformable" else 1.0
    inner = int(tower.hidden_size * share)
    if inner < pyramid.heads or inner % pyramid.heads:
        raise CheckpointError(
            f"{path}: deform_num_heads is {pyramid.heads}, which does not divide the {inner} attention channels "
            f"({tower.hidden_size} x {share}) of {name}; change deform_num_heads or deform_ratio"
        )
    if int(tower.hidden_size * pyramid.ffn_ratio) < 1:
        raise CheckpointError(
            f"{path}: cffn_ratio is {pyramid.ffn_ratio}, which leaves no channel of {name}'s "
            f"{tower.hidden_size}; raise it"
        )
