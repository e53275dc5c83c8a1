"""Each data parallel rank saves the elements that it updates; nothing is gathered, no element is held twice.

mcore's distributed optimizer cuts its flat buffers into one range per rank, so a rank owns [start, stop) of a flattened
parameter. mcore's `fully_reshardable` save gathers these ranges: every rank then holds 12 bytes for every parameter of
its model shard. Here a range becomes boxes, at most 2 n - 1 for n dimensions:

    elements 5..17 of a parameter [4, 6]      . . . . . #     row 0, columns 5..6
                                              # # # # # #     rows 1..2, whole
                                              # # # # # .     row 2, columns 0..5
                                              . . . . . .

Each box is a shard of the whole tensor, under the key that mcore gives it. Readers look for boxes, whatever their
shape, so the folder loads at any layout as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from torch import Tensor

from megatron_v2pe.checkpoint.state.dist_io import SHARDED_STATE_METADATA, any_in_group

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes that hold elements [start, stop) of a tensor in row-major order, in that order.

    boxes_of_range((4, 6), 5, 17) gives ((0, 5), (1, 1)), ((1, 0), (1, 6)), ((2, 0), (1, 5)).
    """
    if start >= stop:
        return
    if len(shape) <= 1:  # a scalar is one element
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    inner = prod(shape[1:])
    first_whole, end_whole = -(-start // inner), stop // inner
    if first_whole > end_whole:  # both ends lie in one row
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


def owned_states(states: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """Shards that this rank saves: of trained parameters its range, of the others what `states` says. Collective.

    Args:
        states: `model_sharded_state_dict`, whose shards hold the parameters themselves.
        optimizer: mcore's, one distributed optimizer or a chain of them.

    Returns:
        `states` with boxes in place of trained parameters, and `optimizer`, as mcore's `fully_reshardable` names it.
    """
    by_parameter = {
        shard.data: _parts(shard)
        for shard in nested_values(dict(states))
        if isinstance(shard, ShardedTensor | ShardedTensorFactory) and _is_trained(shard)
    }
    found: dict[str, Any] = {
        name: {k: v for k, v in shards.items() if not _is_trained(v)} for name, shards in states.items()
    }
    singles = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(singles) > 1:
        optimizer._synchronize_steps()
    weights: dict[str, Any] = {}
    saved = [_optimizer_state(single, by_parameter, weights) for single in singles]
    found["own_weights"] = weights
    found["optimizer"] = saved[0] if len(saved) == 1 else dict(enumerate(saved))
    return found


def _is_trained(shard: Any) -> bool:
    """Of a parameter that the optimizer updates; buffers and frozen parameters are not."""
    return bool(getattr(getattr(shard, "data", None), "requires_grad", False))


@dataclass(frozen=True)
class _Part:
    """A piece of a parameter that is contiguous in it: all of it, or its gate or up half.

    Attributes:
        shard: names the piece and places it in the whole tensor.
        start: its first element in the flattened parameter.
    """

    shard: ShardedTensor
    start: int

    def owned(self, flat: Tensor, first: int, *, prefix: str = "") -> Iterator[ShardedTensor]:
        """Shards of what `flat`, elements [first, first + n) of the parameter, has of this piece."""
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


def _parts(shard: Any) -> list[_Part]:
    built = list(nested_values(shard.build())) if isinstance(shard, ShardedTensorFactory) else [shard]
    for piece in built:
        assert piece.data.is_contiguous(), piece
        assert not piece.prepend_axis_num, piece
    origin = shard.data.storage_offset()
    return [_Part(piece, piece.data.storage_offset() - origin) for piece in built]


def _optimizer_state(
    single: Any, by_parameter: Mapping[Tensor, list[_Part]], weights: dict[str, Any]
) -> dict[str, Any]:
    """State of one distributed optimizer; its parameters' own ranges are added to `weights`."""
    ranges = _own_ranges(single)
    parameters = [parameter for buffer in single.buffers for parameter in buffer.param_index_map]
    is_main = [is_main_replica(by_parameter[parameter][0].shard.replica_id) for parameter in parameters]
    # One data parallel group holds the copies that are saved; its ranks share the writing.
    is_saved = any_in_group(is_main, single.data_parallel_group)
    shards: dict[str, ShardedTensor] = {}
    for parameter, saved in zip(parameters, is_saved, strict=True):
        if not saved or parameter not in ranges:
            continue
        first, stop = ranges[parameter]
        state = single._get_main_param_and_optimizer_states(parameter)
        own = {f"optimizer.state.{name}.": flat for name, flat in state.items() if name != "step"}
        for part in by_parameter[parameter]:
            weight = parameter.detach().view(-1)[first:stop]
            _add(weights, part.owned(weight, first))
            for prefix, flat in own.items():
                _add(shards, part.owned(flat.detach(), first, prefix=prefix))
    kind = SHARDED_STATE_METADATA["distrib_optim_sharding_type"]
    return {**single.state_dict(), "param_state": shards, "param_state_sharding_type": kind}


def _own_ranges(single: Any) -> dict[Tensor, tuple[int, int]]:
    """Parameter -> the elements of it that this rank updates, if there are any."""
    return {
        parameter: (ranges["param"].start, ranges["param"].end)
        for buffer in single.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
    }


def _add(found: dict[str, Any], shards: Iterator[ShardedTensor]) -> None:
    """Collect shards under names of their own; mcore looks at their keys only."""
    found.update({f"{shard.key} {shard.global_offset}": shard for shard in shards})
