"""Whole tensors of a model that is spread over ranks: give each rank its slices, compare each rank's slices.

A rank's parameters are cut into slices by the sharded state that checkpoints are written with: every slice has the
name of its whole tensor and its place in it. Weights are set and results are compared slice by slice on every rank,
so nothing is gathered, copies on other ranks are compared too, and a wrong placement shows.

    whole {key: tensor} --place--> model --slices_of--> [(key, slices, local tensor)] --errors--> {key: error}
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.topology import Ranks

LocalSlice = tuple[str, tuple[slice, ...], tuple[int, ...], Tensor]
"""Key, slices of the whole tensor, its shape, and the local tensor."""


def slices_of(model_chunks: Sequence[InternVL], ranks: Ranks) -> list[LocalSlice]:
    """Every slice that this rank's model chunks hold."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    from megatron_v2pe.checkpoint.state.model_state import model_sharded_state_dict

    built, _, _ = load_preprocess(model_sharded_state_dict(model_chunks, ranks))  # gate and up become two
    found: list[LocalSlice] = []
    for shard in nested_values(built):
        if isinstance(shard, ShardedTensor):
            offsets, shape = shard.global_offset, shard.local_shape
            slices = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
            found.append((shard.key, slices, tuple(shard.global_shape), shard.data.detach()))
    return found


def draw(key: str, shape: Sequence[int]) -> Tensor:
    """Weights of a parameter, from its name alone, float32: norms and LayerScale near 1, all others small."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    is_scale = "norm.weight" in key or key.endswith((".ls1", ".ls2"))
    return torch.empty(tuple(shape)).normal_(1.0 if is_scale else 0.0, 0.08, generator=generator)


def part_of(whole: Tensor, slices: Sequence[slice]) -> Tensor:
    """A slice of a whole tensor; rows beyond its end (vocabulary padding of this layout) are zero."""
    found = whole[tuple(slices)]
    wanted = slices[0].stop - slices[0].start
    if len(found) == wanted:
        return found
    return torch.cat([found, found.new_zeros(wanted - len(found), *found.shape[1:])])


def is_vocabulary(key: str) -> bool:
    """Whether a tensor has a row for each vocabulary entry, padded differently in other layouts."""
    return key.endswith(("word_embeddings.weight", "output_layer.weight"))


def place(model_chunks: Sequence[InternVL], ranks: Ranks, *, vocab_size: int) -> None:
    """Give every parameter its slice of the drawn weights; vocabulary padding is zero."""
    for key, slices, shape, local in slices_of(model_chunks, ranks):
        whole = draw(key, (vocab_size, *shape[1:]) if is_vocabulary(key) else shape)
        local.copy_(part_of(whole, slices))


@contextlib.contextmanager
def gradients_in_place(model_chunks: Sequence[InternVL]) -> Iterator[None]:
    """Within the block parameters hold their gradients; zeros for those that are not trained."""
    kept = {}
    for model_chunk in model_chunks:
        for parameter in model_chunk.parameters():
            kept[parameter] = parameter.data
            gradient = getattr(parameter, "main_grad", None)
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient.view_as(parameter)
    yield
    for parameter, data in kept.items():
        parameter.data = data


def whole_of(found: Iterable[LocalSlice], *, vocab_size: int) -> dict[str, Tensor]:
    """Whole tensors from the slices of a single rank, vocabulary padding cut off."""
    wholes: dict[str, Tensor] = {}
    for key, slices, shape, local in found:
        wholes.setdefault(key, torch.zeros(shape, dtype=local.dtype))[slices] = local.cpu()
    return {key: whole[:vocab_size] if is_vocabulary(key) else whole for key, whole in wholes.items()}


def errors(
    found: Iterable[LocalSlice], wholes: Mapping[str, Tensor], *, scales: Mapping[str, float]
) -> dict[str, float]:
    """Largest deviation of each key's slices, divided by the key's scale; absolute where the scale is 0."""
    worst: dict[str, float] = {}
    for key, slices, _shape, local in found:
        deviation = float((local.cpu() - part_of(wholes[key], slices)).abs().max()) / (scales[key] or 1.0)
        worst[key] = max(worst.get(key, 0.0), deviation if math.isfinite(deviation) else math.inf)
    return worst


def largest(wholes: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest absolute value of each tensor."""
    return {key: float(whole.abs().max()) for key, whole in wholes.items()}


Held = list[tuple[str, list[tuple[int, int]], tuple[int, ...]]]
"""Key, bounds of the slice and shape of the whole tensor, of each slice that a rank compared."""


def held_by(found: Iterable[LocalSlice]) -> Held:
    """Which parts of which whole tensors these slices are."""
    return sorted((key, [(s.start, s.stop) for s in slices], shape) for key, slices, shape, _ in found)


def not_compared(held: Sequence[Any], keys: Iterable[str]) -> list[str]:
    """Keys of which the slices of all ranks together are not every element, so that something went uncompared.

    Args:
        held: what each rank held.
        keys: of all whole tensors.
    """
    parts: dict[tuple[str, tuple[int, ...]], set[Any]] = {}
    for key, bounds, shape in itertools.chain(*held):
        parts.setdefault((key, tuple(shape)), set()).add(tuple(map(tuple, bounds)))
    missing = set(keys) ^ {key for key, _ in parts}
    for (key, shape), places in parts.items():
        compared = sum(math.prod(stop - start for start, stop in place) for place in places)
        if compared != math.prod(shape):
            missing.add(key)
    return sorted(missing)
