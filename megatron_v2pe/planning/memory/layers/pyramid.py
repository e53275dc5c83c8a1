"""Memory of a tower with a pyramid around it: layers of all branches in intervals, an interaction after each.

    tiles of every branch -> patches, class token, positions
    interval:     layers of the large branch, layers of the next one, ...
    interaction:  patches of all branches together -> theirs again

A layer and an interaction are one operation each of an outer tape: what it keeps, its peaks forward and backward are
those of its own tape (`tower.py`, `interaction.py`). `vision.recompute` full keeps the inputs of layers; interactions
keep their inputs only whenever anything is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_v2pe.config.arch.architecture import InternVLArchitecture, VisionArchitecture
from megatron_v2pe.config.arch.flops import tower_branches
from megatron_v2pe.config.arch.pyramid import interval_stops
from megatron_v2pe.config.schema import VisionConfig
from megatron_v2pe.planning.memory.layers.interaction import interaction_ops
from megatron_v2pe.planning.memory.layers.operations import LayerCosts
from megatron_v2pe.planning.memory.layers.stack import Stack, recomputed_bytes
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op, Peaks, moved_bytes, peaks
from megatron_v2pe.planning.memory.layers.tower import tower_layer_ops, tower_shape
from megatron_v2pe.planning.memory.parameters import tower_heads


@dataclass(frozen=True, kw_only=True)
class Part:
    """A layer or an interaction: its peaks, and bytes that its element-wise operations move."""

    whole: Peaks
    again: Peaks
    input_bytes: float
    moved: tuple[float, float]


def part_of(ops: Sequence[Op], input_bytes: float, output_bytes: float | None = None) -> Part:
    """Walk a tape once; `output_bytes` where more than the last operation's output is given on."""
    whole, again = peaks(ops, input_bytes=input_bytes, keeps_input=True), peaks(ops, input_bytes=input_bytes)
    if output_bytes is not None:
        whole, again = replace(whole, output_bytes=output_bytes), replace(again, output_bytes=output_bytes)
    return Part(
        whole=whole,
        again=again,
        input_bytes=input_bytes,
        moved=moved_bytes(ops, input_bytes=input_bytes),
    )


def part_op(name: str, sources: tuple[tuple[str, float], ...], part: Part, *, keeps: str) -> Op:
    """A layer or an interaction as one operation.

    Args:
        name: of the operation.
        sources: names of its inputs, with their sizes.
        part: what is inside.
        keeps: `all` that its operations read again, its `inputs` (and runs again in backward), or `nothing`.
    """
    inputs, output = tuple(source for source, _ in sources), part.whole.output_bytes
    sizes = tuple(size for _, size in sources)
    given = sum(sizes)
    inside = {key: size for key, size in part.whole.kept.items() if key != INPUT}
    if keeps == "all":
        extra = sum(inside.values())
        return Op(
            name=name,
            inputs=inputs,
            output_bytes=output,
            keeps=inputs if INPUT in part.whole.kept else (),
            keeps_extra_bytes=extra,
            forward_bytes=max(0.0, part.whole.forward_bytes - extra - output),
            backward_bytes=max(0.0, part.again.backward_bytes - extra - output - given),
            gradient_bytes=sizes,
        )
    recomputed = keeps == "inputs"
    return Op(
        name=name,
        inputs=inputs,
        output_bytes=output,
        keeps=inputs if recomputed else (),
        forward_bytes=max(0.0, part.whole.inference_bytes - output),
        backward_bytes=max(0.0, recomputed_bytes(part.again) - output) if recomputed else 0.0,
        gradient_bytes=sizes,
    )


@dataclass(frozen=True, kw_only=True)
class PyramidShape:
    """What decides the memory of a pyramid on one rank.

    Attributes:
        tiles: that are encoded together.
        tower_tp: ranks that the branches are split over; interactions are whole on each.
        large: what the large branch's modules allocate.
        new: what those of smaller branches and interactions allocate.
        trains_large: the large branch, or its adapters, get gradients.
        trains_new: smaller branches and interactions do.
    """

    tiles: int
    tower_tp: int
    large: LayerCosts
    new: LayerCosts
    trains_large: bool
    trains_new: bool


class _Tower:
    """The outer tape, as it is written."""

    def __init__(self, arch: InternVLArchitecture, vision: VisionConfig, shape: PyramidShape) -> None:
        assert arch.pyramid is not None
        self.arch, self.vision, self.shape, self.pyramid = arch, vision, shape, arch.pyramid
        self.e = shape.large.element_bytes
        self.branches: tuple[VisionArchitecture, ...] = (arch.vision, *arch.pyramid.branches)
        rows = (arch.patches_per_tile, *(branch.num_positions for branch in arch.pyramid.branches))
        self.sizes = tuple(
            float(shape.tiles * count * branch.hidden_size * self.e)
            for branch, count in zip(self.branches, rows, strict=True)
        )
        self.layers = [self._layer(index) for index in range(len(self.branches))]
        self.stops = [
            interval_stops(branch.num_layers, self.pyramid.num_interactions) for branch in self.branches
        ]
        self.ops: list[Op] = []
        self.moved = [0.0, 0.0]
        self.has_gradients = [shape.trains_large, *(shape.trains_new for _ in self.pyramid.branches)]

    def _layer(self, index: int) -> Part:
        """A layer of a branch."""
        own = self.arch
        if index:
            own = replace(
                own, vision=self.branches[index], image_size=self.branches[index].image_size, pyramid=None
            )
        costs = self.shape.new if index else self.shape.large
        sizes = tower_shape(own, self.vision, tiles=self.shape.tiles, tower_tp=self.shape.tower_tp)
        heads = tower_heads(own.vision, self.shape.tower_tp) // self.shape.tower_tp
        return part_of(tower_layer_ops(sizes, num_heads=heads, costs=costs), self.sizes[index])

    def add(self, op: Op) -> str:
        self.ops.append(op)
        return op.name

    def embed(self) -> list[str]:
        """Tiles of each branch, put in order for the convolution, to patches with class token and positions."""
        names = []
        for index, (pixels, size) in enumerate(zip(self.arch.tile_sizes, self.sizes, strict=True)):
            tile = self.shape.tiles * 3.0 * pixels**2 * self.e
            names.append(
                self.add(
                    Op(
                        name=f"embedded {index}",
                        inputs=(INPUT,),
                        output_bytes=size,
                        forward_bytes=max(2 * size, size + tile),
                        backward_bytes=size + tile,
                        gradient_bytes=(0.0,),
                    )
                )
            )
        return names

    def run(self, states: list[str], interval: int) -> list[str]:
        """Layers of an interval of every branch."""
        ended = []
        for index, state in enumerate(states):
            size, stops = self.sizes[index], self.stops[index]
            has_gradient = self.has_gradients[index] or (self.shape.trains_new and interval > 0)
            name = self.add(Op(name=f"rows {interval} {index}", inputs=(state,), output_bytes=size))
            for layer in range(stops[interval - 1] if interval else 0, stops[interval]):
                keeps = "nothing"
                if has_gradient:
                    keeps = "inputs" if self.vision.recompute == "full" else "all"
                part = self.layers[index]
                name = self.add(part_op(f"layer {index} {layer}", ((name, size),), part, keeps=keeps))
                self._move(part, again=keeps == "inputs")
            ended.append(name)
        return ended

    def interact(self, states: list[str], interval: int) -> list[str]:
        """Patches of all branches together; then each is joined with its class token again."""
        is_last = not self.pyramid.both_ways(interval)
        ops, _ = interaction_ops(self.arch, tiles=self.shape.tiles, costs=self.shape.new, is_last=is_last)
        total = sum(self.sizes)
        part = part_of(ops, total, sum(self.sizes[:1] if is_last else self.sizes))
        has_gradient = self.shape.trains_new or self.shape.trains_large
        keeps = "nothing"
        if has_gradient:
            keeps = "all" if self.vision.recompute == "none" else "inputs"
        sources = tuple(zip(states, self.sizes, strict=True))
        mixed = self.add(part_op(f"interaction {interval}", sources, part, keeps=keeps))
        self._move(part, again=keeps == "inputs")
        joined = []
        for index, size in enumerate(self.sizes[:1] if is_last else self.sizes):
            # Gradients of class token and patches are two tensors of the whole size before they are added.
            joined.append(
                self.add(
                    Op(
                        name=f"joined {interval} {index}",
                        inputs=(mixed,),
                        output_bytes=size,
                        backward_bytes=size,
                        gradient_bytes=(size,),
                    )
                )
            )
        return joined

    def join(self, states: list[str]) -> None:
        """Patches of all branches as rows, where the readout takes all of them."""
        given, joined = (
            tuple(self.sizes),
            tiles_bytes(self.arch, tiles=self.shape.tiles, element_bytes=self.e),
        )
        self.add(Op(name="rows of all", inputs=tuple(states), output_bytes=joined, gradient_bytes=given))

    def _move(self, part: Part, *, again: bool) -> None:
        forward, backward = part.moved
        self.moved[0] += forward
        self.moved[1] += backward + (forward if again else 0.0)


def tiles_bytes(arch: InternVLArchitecture, *, tiles: int, element_bytes: int) -> float:
    """What the tower gives the readout or projector: the large branch's rows, or patches of all branches."""
    if not arch.reads_all_branches:
        return float(tiles * arch.patches_per_tile * arch.vision.hidden_size * element_bytes)
    values = sum((rows - 1) * vision.hidden_size for vision, rows in tower_branches(arch))
    return float(tiles * values * element_bytes)


@lru_cache(maxsize=1024)  # a search asks for the same tower again and again
def pyramid_stack(arch: InternVLArchitecture, vision: VisionConfig, shape: PyramidShape) -> Stack:
    """Embedding, layers and interactions of all branches for some tiles; what is read of them is the stack's output."""
    tower = _Tower(arch, vision, shape)
    assert arch.pyramid is not None
    states = tower.embed()
    for interval in range(arch.pyramid.num_interactions):
        states = tower.interact(tower.run(states, interval), interval)
    if arch.reads_all_branches:
        tower.join(states)
    whole = peaks(tower.ops, input_bytes=0.0)
    return Stack(
        kept_bytes=whole.kept_bytes,
        host_bytes=0.0,
        forward_bytes=whole.forward_bytes,
        inference_bytes=whole.inference_bytes,
        backward_bytes=whole.backward_bytes,
        moved_forward_bytes=tower.moved[0],
        moved_backward_bytes=tower.moved[1],
        kept=whole.kept,
    )
