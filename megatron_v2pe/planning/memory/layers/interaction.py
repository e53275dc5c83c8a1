"""An interaction of a pyramid's branches as a tape: what `models/piip/interaction.py` and `attention.py` allocate.

    into one branch:  norm -> offsets, weights -> locations
                      project the other -> norm -> values -> samples -> weighted sum -> output -> gate -> add
                      norm -> fc1 -> depthwise convolution -> gelu -> fc2 -> gate -> add

Samples [n, N, P, d] and what follows them up to their sum are float32 whatever the dtype is: the largest tensors of a
tower. Sizes of tensors are bytes.

Shape legend: n tiles, N patches of the branch and N' of its neighbour, C, C' their channels, H heads, P points, d
channels of all heads together, h hidden channels of the feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.arch.pyramid import PyramidArchitecture
from megatron_v2pe.planning.memory.layers.operations import FLOAT_BYTES, LayerCosts
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op


@dataclass(frozen=True, kw_only=True)
class Side:
    """A branch in an interaction: patches of all tiles, and channels."""

    rows: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Way:
    """One direction of an interaction.

    Attributes:
        name: prefix of its operations.
        into: the branch that is changed.
        other: the branch that is read.
        read: name of the tensor of the branch that is changed, and of the one that is read.
        pyramid: heads, points, ratios.
        costs: element size and what is fused.
    """

    name: str
    into: Side
    other: Side
    read: tuple[str, str]
    pyramid: PyramidArchitecture
    costs: LayerCosts

    def bytes(self, rows: int, channels: int) -> float:
        """Of a tensor in the compute dtype."""
        return float(rows * channels * self.costs.element_bytes)

    def op(self, name: str, source: str, size: float, **more: object) -> Op:
        """An operation of this direction; `keeps` and names of its own tensors get the prefix."""
        return Op(name=f"{self.name}{name}", inputs=(source,), output_bytes=size, **more)  # type: ignore[arg-type]

    def own(self, name: str) -> str:
        """Full name of a tensor of this direction."""
        return f"{self.name}{name}"


def _norm(way: Way, name: str, source: str, size: float) -> list[Op]:
    """LayerNorm keeps its input; without norms the input passes through."""
    if not way.pyramid.norm:
        return [Op(name=way.own(name), inputs=(source,), view_of=source, output_bytes=size)]
    return [way.op(name, source, size, keeps=(source,))]


def _linear(way: Way, name: str, source: str, shape: tuple[int, int, int]) -> Op:
    """[rows, columns in] to [rows, columns out]: keeps its input; the weight's gradient exists for a moment."""
    rows, inputs, outputs = shape
    return way.op(
        name,
        source,
        way.bytes(rows, outputs),
        keeps=(source,),
        backward_bytes=way.bytes(outputs, inputs),
        is_matrix=True,
    )


def _sampled(way: Way, queries: str, values: str, value_width: int) -> list[Op]:
    """Deformable attention, from normed queries and values to the output of its last linear."""
    pyramid, into, other = way.pyramid, way.into, way.other
    inner, places = int(into.width * pyramid.value_ratio), pyramid.heads * pyramid.points
    points, samples = (
        float(into.rows * places * 2 * FLOAT_BYTES),
        float(into.rows * inner * pyramid.points * FLOAT_BYTES),
    )
    weights, maps = float(into.rows * places * FLOAT_BYTES), float(other.rows * inner * FLOAT_BYTES)
    summed = float(into.rows * inner * FLOAT_BYTES)
    softmax = way.bytes(into.rows, places)
    return [
        _linear(way, "offsets", queries, (into.rows, into.width, 2 * places)),
        way.op("locations", way.own("offsets"), points, forward_bytes=points, passes_gradient=True),
        _linear(way, "logits", queries, (into.rows, into.width, places)),
        way.op("weights", way.own("logits"), softmax, keeps=(way.own("weights"),)),
        _linear(way, "values", values, (other.rows, value_width, inner)),
        way.op("maps", way.own("values"), maps),
        way.op("grid", way.own("locations"), points, forward_bytes=points),
        Op(
            name=way.own("samples"),
            inputs=(way.own("maps"), way.own("grid")),
            output_bytes=samples,
            keeps=(way.own("maps"), way.own("grid")),
        ),
        way.op("weights in order", way.own("weights"), weights),
        Op(
            name=way.own("summed"),
            inputs=(way.own("samples"), way.own("weights in order")),
            output_bytes=summed,
            keeps=(way.own("samples"), way.own("weights in order")),
            forward_bytes=samples,
            backward_bytes=samples,
        ),
        way.op("summed in order", way.own("summed"), way.bytes(into.rows, inner)),
        _linear(way, "attended", way.own("summed in order"), (into.rows, inner, into.width)),
    ]


def _dense(way: Way, queries: str, values: str, value_width: int) -> list[Op]:
    """Every patch to every patch, through torch's fused kernel."""
    into, other = way.into, way.other
    sides = [
        _linear(way, "q", queries, (into.rows, into.width, into.width)),
        _linear(way, "k", values, (other.rows, value_width, into.width)),
        _linear(way, "v", values, (other.rows, value_width, into.width)),
    ]
    names = tuple(op.name for op in sides)
    mixed = Op(
        name=way.own("mixed"),
        inputs=names,
        output_bytes=way.bytes(into.rows, into.width),
        keeps=(*names, way.own("mixed")),
        keeps_extra_bytes=float(into.rows * way.pyramid.heads * FLOAT_BYTES),
        is_matrix=True,
    )
    return [*sides, mixed, _linear(way, "attended", way.own("mixed"), (into.rows, into.width, into.width))]


def _gated(way: Way, name: str, source: str, residual: str) -> list[Op]:
    """x + gate * source: the gate's gradient needs what it scales."""
    size = way.bytes(way.into.rows, way.into.width)
    scaled = way.op(f"{name} scaled", source, size, keeps=(source,), backward_bytes=size)
    return [
        scaled,
        Op(name=way.own(name), inputs=(residual, scaled.name), output_bytes=size, passes_gradient=True),
    ]


def way_ops(way: Way) -> list[Op]:
    """One direction; its output is called `{way.name}output`."""
    pyramid, into, other = way.pyramid, way.into, way.other
    own, neighbour = way.read
    value_width, values, ops = other.width, neighbour, []
    if pyramid.projection:
        ops.append(_linear(way, "projected", neighbour, (other.rows, other.width, into.width)))
        value_width, values = into.width, way.own("projected")
    hidden, size = int(into.width * pyramid.ffn_ratio), way.bytes(into.rows, into.width)
    ops += _norm(way, "queries", own, size)
    ops += _norm(way, "read", values, way.bytes(other.rows, value_width))
    attention = _sampled if pyramid.attention == "deformable" else _dense
    ops += attention(way, way.own("queries"), way.own("read"), value_width)
    ops += _gated(way, "middle", way.own("attended"), own)
    ops += _norm(way, "normed", way.own("middle"), size)
    inner = way.bytes(into.rows, hidden)
    ops += [
        _linear(way, "fc1", way.own("normed"), (into.rows, into.width, hidden)),
        # The map is put in order before the convolution, and its gradient after it.
        way.op("image", way.own("fc1"), inner),
        way.op("convolved", way.own("image"), inner, keeps=(way.own("image"),), backward_bytes=inner),
        way.op("gelu", way.own("convolved"), inner, keeps=(way.own("convolved"),)),
        _linear(way, "fc2", way.own("gelu"), (into.rows, hidden, into.width)),
    ]
    source = way.own("fc2")
    if pyramid.drop_path:
        ops.append(way.op("dropped", source, size))
        source = way.own("dropped")
    return [*ops, *_gated(way, "output", source, way.own("middle"))]


def sides(arch: InternVLArchitecture, tiles: int) -> tuple[Side, ...]:
    """Every branch of the tower, the large one first."""
    assert arch.pyramid is not None
    large = Side(rows=tiles * (arch.patches_per_tile - 1), width=arch.vision.hidden_size)
    smaller = (
        Side(rows=tiles * (branch.num_positions - 1), width=branch.hidden_size)
        for branch in arch.pyramid.branches
    )
    return (large, *smaller)


def interaction_ops(
    arch: InternVLArchitecture, *, tiles: int, costs: LayerCosts, is_last: bool
) -> tuple[list[Op], tuple[str, ...]]:
    """Exchanges between all neighbours, the finest pair first, and the names of the branches' new features.

    The input is the patches of all branches together.
    """
    pyramid = arch.pyramid
    assert pyramid is not None
    branches = sides(arch, tiles)
    names, ops = [], []
    for index, side in enumerate(branches):
        size = float(side.rows * side.width * costs.element_bytes)
        names.append(f"branch {index}")
        ops.append(
            Op(name=names[-1], inputs=(INPUT,), view_of=INPUT, output_bytes=size, gradient_bytes=(size,))
        )
    for index in reversed(range(len(branches) - 1)):
        pair = (names[index], names[index + 1])
        directions = [("into larger", index, index + 1, pair)]
        if not is_last:
            directions.append(("into smaller", index + 1, index, pair[::-1]))
        for what, into, other, read in directions:
            way = Way(
                name=f"{index} {what}: ",
                into=branches[into],
                other=branches[other],
                read=read,
                pyramid=pyramid,
                costs=costs,
            )
            ops += way_ops(way)
            names[into] = way.own("output")
    return ops, tuple(names)
