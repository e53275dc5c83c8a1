"""Memory of the vision tower and the projector on one rank of the first stage.

    pixels [n, 3, S, S] -> patches -> layers -> pixel shuffle -> norm -> fc1 -> gelu -> fc2 -> features [n K, H]

`vision.micro_batch_tiles` encodes slices of the tiles one after the other and keeps nothing of them: backward runs
each slice again.

Shape legend: n tiles of this rank, P patches + 1, K visual tokens of a tile, C tower channels, H language channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import VisionConfig
from megatron_v2pe.planning.memory.layers.operations import LayerCosts, linear_op, norm_ops
from megatron_v2pe.planning.memory.layers.pyramid import PyramidShape, pyramid_stack, tiles_bytes
from megatron_v2pe.planning.memory.layers.readout import readout_ops
from megatron_v2pe.planning.memory.layers.stack import Stack, recomputed_bytes
from megatron_v2pe.planning.memory.layers.tape import INPUT, Op, Peaks, peaks
from megatron_v2pe.planning.memory.layers.tower import tower_stack


@dataclass(frozen=True, kw_only=True)
class VisionPeaks:
    """Bytes of tower and projector.

    Attributes:
        kept_bytes: between forward and backward.
        forward_bytes: most during forward.
        backward_bytes: most during backward, the gradient of the features included.
        features_bytes: [n K, H].
        moved_bytes: read and written by element-wise operations, forward and backward.
        kept: what a layer keeps, by tensor.
    """

    kept_bytes: float
    forward_bytes: float
    backward_bytes: float
    features_bytes: float
    moved_bytes: float
    kept: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """What decides the tower's memory.

    Attributes:
        tiles: n, at least 1: a rank without tiles encodes a blank one.
        tower_tp: ranks that the tower is split over.
        trains_tower: the tower (of a pyramid its large branch), or its adapters, get gradients.
        trains_projector: the projector, or its adapters, get gradients.
        projector: what the projector's modules allocate.
        trains_pyramid: smaller branches and interactions of a pyramid get gradients.
    """

    tiles: int
    tower_tp: int
    trains_tower: bool
    trains_projector: bool
    projector: LayerCosts
    trains_pyramid: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether anything before the projector gets gradients."""
        return self.trains_tower or self.trains_pyramid


def projector_ops(arch: InternVLArchitecture, *, tiles: int, tower_tp: int, costs: LayerCosts) -> list[Op]:
    """shuffle (a copy) -> LayerNorm -> fc1 -> bias -> gelu -> fc2 -> bias; or a pyramid's readout."""
    if arch.reads_all_branches:
        return readout_ops(arch, tiles=tiles, costs=costs)
    e, hidden = costs.element_bytes, arch.language.hidden_size
    channels = arch.projector_width
    rows = tiles * arch.tokens_per_tile
    shuffled, inner, output = rows * channels * e, rows * hidden // tower_tp * e, rows * hidden * e
    return [
        Op(name="shuffled", inputs=(INPUT,), output_bytes=shuffled),
        *norm_ops("projector norm", "shuffled", shuffled, costs, rms=False),
        linear_op(
            "projector fc1",
            "projector norm",
            role="linear_fc1",
            input_bytes=shuffled,
            output_bytes=inner,
            weight_bytes=channels * hidden // tower_tp * e,
            costs=costs,
        ),
        Op(name="biased", inputs=("projector fc1",), output_bytes=inner, passes_gradient=True),
        Op(name="gelu", inputs=("biased",), output_bytes=inner, keeps=("biased",)),
        linear_op(
            "projector fc2",
            "gelu",
            role="linear_fc2",
            input_bytes=inner,
            output_bytes=output,
            weight_bytes=hidden * hidden // tower_tp * e,
            costs=costs,
        ),
        Op(name="features", inputs=("projector fc2",), output_bytes=output, passes_gradient=True),
    ]


@lru_cache(maxsize=1024)  # a search asks for the same tower again and again
def vision_peaks(
    arch: InternVLArchitecture, vision: VisionConfig, shape: VisionShape, costs: LayerCosts
) -> VisionPeaks:
    """Memory of encoding this rank's tiles, at once or in slices."""
    slice_tiles = vision.micro_batch_tiles or shape.tiles
    whole = _at_once(arch, vision, shape, min(slice_tiles, shape.tiles), costs)
    if shape.tiles <= slice_tiles:
        return whole
    features = whole.features_bytes * shape.tiles / slice_tiles
    hidden = tiles_bytes(arch, tiles=shape.tiles, element_bytes=costs.element_bytes)
    trains = shape.is_trained or shape.trains_projector
    kept = hidden if shape.trains_projector and not shape.is_trained else 0.0
    again = max(whole.forward_bytes + whole.features_bytes, whole.backward_bytes)
    return VisionPeaks(
        kept_bytes=kept,
        forward_bytes=kept + features + max(whole.forward_bytes, features),
        backward_bytes=kept + features + again if trains else 0.0,
        features_bytes=features,
        moved_bytes=_moved(arch, vision, shape, costs) * (4 / 3 if trains else 1),  # slices run forward twice
        kept={},
    )


def _at_once(
    arch: InternVLArchitecture, vision: VisionConfig, shape: VisionShape, tiles: int, costs: LayerCosts
) -> VisionPeaks:
    """`tiles` tiles in one pass.

    A frozen tower keeps nothing; a frozen projector over
    a trained tower keeps what gradients pass through.
    """
    layers = _layers(arch, vision, shape, tiles, costs)
    hidden = tiles_bytes(arch, tiles=tiles, element_bytes=costs.element_bytes)
    last = _last(arch, vision, shape, tiles, hidden)
    kept = layers.kept_bytes if shape.is_trained else 0.0
    # Embedding the patches makes three tensors of a layer's input.
    first = layers.forward_bytes if shape.is_trained else layers.inference_bytes
    return VisionPeaks(
        kept_bytes=kept + _projector_kept(last, shape),
        forward_bytes=max(3 * hidden, first, kept + hidden + last.forward_bytes),
        backward_bytes=max(
            kept + last.backward_bytes if shape.is_trained or shape.trains_projector else 0.0,
            layers.backward_bytes if shape.is_trained else 0.0,
        ),
        features_bytes=last.output_bytes,
        moved_bytes=_moved(arch, vision, shape, costs),
        kept=layers.kept if shape.is_trained else {},
    )


def _last(
    arch: InternVLArchitecture, vision: VisionConfig, shape: VisionShape, tiles: int, hidden: float
) -> Peaks:
    """The projector; a pyramid's readout keeps only what it is given, where anything of the tower is recomputed."""
    ops = projector_ops(arch, tiles=tiles, tower_tp=shape.tower_tp, costs=shape.projector)
    found = peaks(ops, input_bytes=hidden)
    if not arch.reads_all_branches or vision.recompute == "none":
        return found
    return replace(
        found,
        kept_bytes=hidden,
        kept={INPUT: hidden},
        forward_bytes=found.inference_bytes,
        backward_bytes=hidden + recomputed_bytes(found),
    )


def _layers(
    arch: InternVLArchitecture, vision: VisionConfig, shape: VisionShape, tiles: int, costs: LayerCosts
) -> Stack:
    """The tower for some tiles: InternViT's layers, or a pyramid with its embeddings."""
    if arch.pyramid is None:
        return tower_stack(arch, vision, tiles=tiles, tower_tp=shape.tower_tp, costs=costs)
    new = replace(costs, is_trained=shape.trains_pyramid, adapters=(), drops_inputs=False)
    sizes = PyramidShape(
        tiles=tiles,
        tower_tp=shape.tower_tp,
        large=costs,
        new=new,
        trains_large=shape.trains_tower,
        trains_new=shape.trains_pyramid,
    )
    return pyramid_stack(arch, vision, sizes)


def _moved(arch: InternVLArchitecture, vision: VisionConfig, shape: VisionShape, costs: LayerCosts) -> float:
    """Bytes of element-wise operations for all tiles of the rank; the projector's are left out."""
    layers = _layers(arch, vision, shape, shape.tiles, costs)
    return layers.moved_forward_bytes + (layers.moved_backward_bytes if shape.is_trained else 0.0)


def _projector_kept(projector: Peaks, shape: VisionShape) -> float:
    return projector.kept_bytes if shape.is_trained or shape.trains_projector else 0.0
