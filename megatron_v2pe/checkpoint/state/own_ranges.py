"""Each data parallel rank saves the elements that it updates; nothing is gathered, no element is in memory twice.

mcore's distributed optimizer cuts its flat buffers into one range per rank, so a rank owns [start, stop) of a flattened
parameter. mcore's `fully_reshardable` save gathers these ranges: every rank then has 12 bytes for every parameter of
its model shard in memory. Here a range becomes boxes, at most 2 n - 1 for n dimensions:

    elements 5..17 of a parameter [4, 6]      . . . . . #     row 0, columns 5..6
                                              # # # # # #     rows 1..2, whole
                                              # # # # # .     row 2, columns 0..5
                                              . . . . . .

Each box is a shard of the whole tensor, under the key that mcore gives it. Readers accept boxes of any shape, so the
folder loads at any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_v2pe.checkpoint.state import private_api
from megatron_v2pe.checkpoint.state.model_state import SHARDED_STATE_METADATA
from megatron_v2pe.checkpoint.state.ranks import any_in_group

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes of elements [start, stop) of a tensor in row-major order, in that order.

    boxes_of_range((4, 6), 5, 17) gives ((0, 5), (1, 1)), ((1, 0), (1, 6)), ((2, 0), (1, 5)).
    """
    if start >= stop:
        return
    if len(shape) <= 1:  # a scalar is one element
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:  # both ends are in one row
        yield from _in_row(shape, end_whole, start - end_whole * inner, stop - end_whole * inner)
        return
    if start < first_whole * inner:
        yield from _in_row(shape, first_whole - 1, start - (first_whole - 1) * inner, inner)
    if first_whole < end_whole:
        zeros = (0,) * (len(shape) - 1)
        yield (first_whole, *zeros), (end_whole - first_whole, *shape[1:])
    yield from _in_row(shape, end_whole, 0, stop - end_whole * inner)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes_of_range(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def owned_shards(states: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shards that this rank saves: of trained parameters its range, of the others the shards of `states`. Collective.

    Args:
        states: `model_sharded_state_dict`, whose shards have the parameters themselves as data.
        optimizer: mcore's, one distributed optimizer or a chain of them.

    Returns:
        `states` with boxes in place of trained parameters, and `optimizer`, as mcore's `fully_reshardable` names it.
    """
    by_parameter = {
        shard.data: _contiguous_shards(shard)
        for shards in states.values()
        for shard in shards.values()
        if _is_trained(shard)
    }
    found: dict[str, Any] = {
        name: {k: v for k, v in shards.items() if not _is_trained(v)} for name, shards in states.items()
    }
    weights: dict[str, Any] = {}
    saved = [
        _optimizer_state(single, by_parameter, weights) for single in private_api.single_optimizers(optimizer)
    ]
    found["own_weights"] = weights
    found["optimizer"] = saved[0] if len(saved) == 1 else dict(enumerate(saved))
    return found


def _is_trained(shard: Any) -> bool:
    """Of a parameter that the optimizer updates; buffers and frozen parameters are not."""
    return bool(getattr(getattr(shard, "data", None), "requires_grad", False))


@dataclass(frozen=True)
class _ContiguousShard:
    """A shard that is contiguous in a parameter: all of the parameter, or its gate or up half.

    Attributes:
        shard: its key, and its place in the whole tensor.
        start: its first element in the flattened parameter.
    """

    shard: ShardedTensor
    start: int

    def owned(self, flat: Tensor, first: int, *, prefix: str = "") -> Iterator[ShardedTensor]:
        """Shards of what `flat`, elements [first, first + n) of the parameter, has of this shard."""
        shape = tuple(self.shard.local_shape)
        start = max(first, self.start)
        stop = min(first + flat.numel(), self.start + prod(shape))
        for offsets, sizes in boxes_of_range(shape, start - self.start, stop - self.start):
            data = flat[start - first : start - first + prod(sizes)].view(sizes)
            start += prod(sizes)
            yield ShardedTensor(
                key=prefix + self.shard.key,
                data=data,
                dtype=data.dtype,
                local_shape=sizes,
                global_shape=self.shard.global_shape,
                global_offset=tuple(map(sum, zip(self.shard.global_offset, offsets, strict=True))),
                axis_fragmentations=None,  # boxes are no regular grid
                allow_shape_mismatch=self.shard.allow_shape_mismatch,
            )


def _contiguous_shards(shard: Any) -> list[_ContiguousShard]:
    """The shard itself, or those that a factory builds from its parameter."""
    built = private_api.built_shards(shard) if isinstance(shard, ShardedTensorFactory) else [shard]
    for single in built:
        assert single.data.is_contiguous(), single
        assert not single.prepend_axis_num, single
    origin = shard.data.storage_offset()
    return [_ContiguousShard(single, single.data.storage_offset() - origin) for single in built]


def _optimizer_state(
    single: Any, by_parameter: Mapping[Tensor, list[_ContiguousShard]], weights: dict[str, Any]
) -> dict[str, Any]:
    """State of one distributed optimizer; its parameters' own ranges are added to `weights`."""
    ranges = private_api.owned_ranges(single)
    parameters = private_api.optimized_parameters(single)
    is_written = [private_api.is_written_here(by_parameter[parameter][0].shard) for parameter in parameters]
    # One data parallel group has the copies that are saved; its ranks share the writing.
    is_saved = any_in_group(is_written, private_api.owner_group(single))
    shards: dict[str, ShardedTensor] = {}
    for parameter, saved in zip(parameters, is_saved, strict=True):
        if not saved or parameter not in ranges:
            continue
        first, stop = ranges[parameter]
        states = private_api.owned_states(single, parameter)
        weight = parameter.detach().view(-1)[first:stop]
        for shard in by_parameter[parameter]:
            _add(weights, shard.owned(weight, first))
            for name, flat in states.items():
                _add(shards, shard.owned(flat.detach(), first, prefix=f"optimizer.state.{name}."))
    kind = SHARDED_STATE_METADATA["distrib_optim_sharding_type"]
    return {**single.state_dict(), "param_state": shards, "param_state_sharding_type": kind}


def _add(found: dict[str, Any], shards: Iterator[ShardedTensor]) -> None:
    """Collect shards under unique names; mcore uses their keys only."""
    found.update({f"{shard.key} {shard.global_offset}": shard for shard in shards})
