"""Low-rank adapters on mcore's parallel linears: y = W x + alpha / r * B A x, with W frozen.

    column linear   dropout(x) --A [r, in]-->      copy | gather           --B [out / tp, r]-->  add to this rank's rows
    row linear      dropout(x) --A [r, in / tp]--> sum | reduce-scatter    --B [out, r]-->       add to the whole output
                                                   ^ `exchange`: without | with sequence parallelism

What tensor parallel ranks exchange is r wide, and the factor on its narrow side is whole on every rank.

mcore fuses linears that are separate in Hugging Face models: queries, keys and values; gate and up. An adapter belongs
to a linear of the Hugging Face model, so a fused linear has several pairs (A, B), each of which adds to its own rows.
One shared A would be cheaper, but could not be written as a PEFT adapter.

Shape legend: r rank, g kv groups of this rank (1 where rows are not grouped), b blocks of a part's rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_v2pe.config.lora import ADAPTERS


@dataclass(frozen=True, kw_only=True)
class FusedPart:
    """A linear of the Hugging Face model, as rows of one of ours.

    Attributes:
        name: what `lora.targets` calls it.
        share: its rows in a group, in units that the parts of a linear have in common (queries per key: m, 1, 1).
        blocks: runs of rows that tensor parallelism splits one by one: 2 for a tensor that holds gate above up.
    """

    name: str
    share: int = 1
    blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class LinearAdapters:
    """The adapters of one linear of a layer; data, and the two things that tensor parallel ranks do together.

    Attributes:
        parts: everything that is fused in the linear, in the order of its rows.
        adapted: names of the parts that have an adapter.
        rank: r.
        scale: alpha / r.
        dropout: share of the input that is zeroed in training.
        is_row: the linear splits its input over tp, not its output.
        group_rows: rows after which the parts repeat (a kv group); 0 when they do not.
        exchange: what happens between A and B.
        dropout_generator: context that draws different numbers on each rank, where ranks hold different inputs.
    """

    parts: tuple[FusedPart, ...]
    adapted: tuple[str, ...]
    rank: int
    scale: float
    dropout: float
    is_row: bool
    group_rows: int = 0
    exchange: Callable[[Tensor], Tensor] = lambda x: x
    dropout_generator: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def adapter_key(name: str) -> str:
    """Name of a linear as part of a parameter's name, which splits at dots."""
    return name.replace(".", "_")


def adapter_prefix(linear: str, name: str) -> str:
    """State keys of the adapter `name` of one of our linears are this followed by `lora_A` or `lora_B`."""
    return f"{linear}.{ADAPTERS}.{adapter_key(name)}."


class Adapter(torch.nn.Module):
    """One pair of factors, zero until they are drawn or loaded.

    Attributes:
        lora_A: [r, in], in of this rank.
        lora_B: [b, rows, r], rows of this rank.
    """

    def __init__(self, *, rank: int, in_size: int, blocks: int, rows: int, like: Tensor) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(like.new_zeros(rank, in_size))
        self.lora_B = torch.nn.Parameter(like.new_zeros(blocks, rows, rank))


class FusedAdapters(torch.nn.ModuleDict):
    """All adapters of one linear.

    Args:
        spec: what they are.
        weight: [rows, in] of this rank.
    """

    def __init__(self, spec: LinearAdapters, weight: Tensor) -> None:
        super().__init__()
        self.spec = spec
        num_rows, in_size = weight.shape
        self.num_groups = num_rows // (spec.group_rows or num_rows)
        unit = num_rows // sum(part.share for part in spec.parts)
        self.rows_of = {part.name: unit * part.share for part in spec.parts}
        for part in spec.parts:
            if part.name in spec.adapted:
                rows = self.rows_of[part.name] // part.blocks
                self[adapter_key(part.name)] = Adapter(
                    rank=spec.rank, in_size=in_size, blocks=part.blocks, rows=rows, like=weight.detach()
                )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to what is added to the linear's output, [..., rows]."""
        deltas = {name: self._delta(name, x) for name in self.spec.adapted}
        if len(self.spec.parts) == 1:
            return deltas[self.spec.parts[0].name]
        example = next(iter(deltas.values()))
        for name, rows in self.rows_of.items():
            if name not in deltas:
                deltas[name] = example.new_zeros(*example.shape[:-1], rows)
        # Side by side within each group: [..., g * rows of a part] -> [..., g, rows of a part] -> [..., g * all rows]
        grouped = [deltas[name].unflatten(-1, (self.num_groups, -1)) for name in self.rows_of]
        return torch.cat(grouped, dim=-1).flatten(-2)

    def _delta(self, name: str, x: Tensor) -> Tensor:
        adapter = self[adapter_key(name)]
        assert isinstance(adapter, Adapter)
        if self.training and self.spec.dropout:
            with self.spec.dropout_generator():
                x = F.dropout(x, self.spec.dropout)
        narrow = self.spec.exchange(F.linear(x, adapter.lora_A)) * self.spec.scale
        return F.linear(narrow, adapter.lora_B.flatten(0, 1))  # [b, rows, r] -> [b * rows, r]

    def split_names(self) -> Iterator[str]:
        """Names of the factors that are split over tp, all of them along dimension 1."""
        yield from (f"{key}.{'lora_A' if self.spec.is_row else 'lora_B'}" for key in self)

    def mark(self, *, sequence_parallel: bool) -> None:
        """Set the attributes by which mcore knows split factors and gradients that are summed over tp."""
        split = set(self.split_names())
        for name, parameter in self.named_parameters():
            if name in split:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=1, stride=1)
            else:
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


def with_adapters(linear: Any, spec: LinearAdapters) -> Any:
    """A class of linear like `linear` (mcore's local one or Transformer Engine's) that has adapters.

    The names of its own parameters stay what they were, so that a checkpoint without adapters loads into it.
    """

    class Adapted(linear):
        def __init__(self, *args: Any, config: Any, tp_group: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, tp_group=tp_group, **kwargs)
            self._adapter_group = tp_group
            self.lora = FusedAdapters(spec, self.weight)
            self.lora.mark(sequence_parallel=config.sequence_parallel)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x, *args, **kwargs)
            return output + self.lora(x), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
        ) -> dict[str, Any]:
            shards = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            adapters = make_sharded_tensors_for_checkpoint(
                self.lora.state_dict(keep_vars=True),
                f"{prefix}{ADAPTERS}.",
                dict.fromkeys(self.lora.split_names(), 1),
                sharded_offsets,
                tp_group=self._adapter_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            return {**shards, **adapters}

    return Adapted
