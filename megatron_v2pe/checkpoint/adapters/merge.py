"""A checkpoint's tensors as those of a whole model: adapters are merged into their base, some rows at a time.

    open_state(checkpoint) --whole model--> StateReader
                           --adapters-----> MergedReader: base's rows + alpha / r * B A

All code that reads tensors through `open_state` (export, verify) accepts both kinds of checkpoint. Sums are computed in
float32 and rounded once to the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_v2pe.checkpoint.adapters.weights import AdaptedLinear, adapted_linears
from megatron_v2pe.checkpoint.files.adapter_record import AdapterRecord, find_base, read_record
from megatron_v2pe.checkpoint.files.folder import hf_path, state_path
from megatron_v2pe.checkpoint.files.tensor_files import TensorInfo
from megatron_v2pe.checkpoint.hf.name_map import Entry
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.config.arch.architecture import read_architecture

_OPTIMIZER_PREFIX = "optimizer."
_ROWS_AT_A_TIME = 1024


class TensorReader(Protocol):
    """Tensors by state key.

    Attributes:
        folder: where they come from, for messages.
        tensors: state key -> dtype and shape.
    """

    folder: Path
    tensors: dict[str, TensorInfo]

    def read(self, key: str) -> Tensor:
        """One whole tensor."""

    def read_rows(self, key: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of a tensor, into `out`."""


def open_state(checkpoint: str | Path) -> TensorReader:
    """Tensors of a checkpoint of either kind.

    Raises:
        CheckpointError: it cannot be read, or holds adapters whose base is gone.
    """
    record = read_record(checkpoint)
    stored = StateReader(state_path(checkpoint))
    if record is None:
        return stored
    linears = adapted_linears(record.lora, read_architecture(hf_path(checkpoint)))
    return MergedReader(stored, StateReader(state_path(find_base(checkpoint))), record, list(linears))


class MergedReader:
    """The tensors of a base with adapters merged into them.

    Args:
        stored: adapters, and parts that were trained whole.
        base: the base's tensors.
        record: what the adapters are.
        linears: linears that have one.

    Attributes:
        folder: of `stored`.
        tensors: those of a whole model.
    """

    def __init__(
        self,
        stored: TensorReader,
        base: TensorReader,
        record: AdapterRecord,
        linears: Sequence[AdaptedLinear],
    ) -> None:
        self.folder = stored.folder
        self._stored = stored
        self._base = base
        self._record = record
        self._linears: dict[str, list[AdaptedLinear]] = {}
        for linear in linears:
            self._linears.setdefault(linear.entry.ours, []).append(linear)
        self.tensors = {
            key: (stored if record.holds(key) else base).tensors.get(key, info)
            for key, info in base.tensors.items()
            if not key.startswith(_OPTIMIZER_PREFIX)
        }
        self._products: tuple[str, RowProducts] | None = None  # of the tensor that was read last

    def read(self, key: str) -> Tensor:
        """One whole tensor."""
        info = self.tensors[key]
        if self._record.holds(key) or key not in self._linears:
            return (self._stored if self._record.holds(key) else self._base).read(key)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for start in range(0, len(whole), _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, len(whole))
            self.read_rows(key, start, stop, whole[start:stop])
        return whole

    def read_rows(self, key: str, start: int, stop: int, out: Tensor) -> None:
        """Rows [start, stop) of a tensor; see `StateReader.read_rows`."""
        source = self._stored if self._record.holds(key) else self._base
        source.read_rows(key, start, stop, out)
        if source is self._base and key in self._linears:
            rows = out.reshape(stop - start, *self.tensors[key].shape[1:])
            added = self._products_of(key).rows(start, stop)
            # Padding heads of a split tower come after the real rows and columns, and are not changed.
            real = rows[: len(added), : added.shape[1]]
            real.copy_(real.float() + added)

    def _products_of(self, key: str) -> RowProducts:
        if self._products is None or self._products[0] != key:
            linears, lora = self._linears[key], self._record.lora
            scale = lora.alpha_of(linears[0].part) / lora.rank_of(linears[0].part)
            factors = {linear.index: hf_factors(linear, self._stored.read) for linear in linears}
            self._products = key, RowProducts(linears[0].entry, factors, scale)
        return self._products[1]


@dataclass(frozen=True)
class RowProducts:
    """scale * B A of the adapters of one of our weights, by our rows.

    Attributes:
        entry: the weight's entry of the names table.
        factors: index of a linear in the entry -> its A [r, in] and B [out, r].
        scale: alpha / r.
    """

    entry: Entry
    factors: dict[int, tuple[Tensor, Tensor]]
    scale: float

    @property
    def _sizes(self) -> list[int]:
        return [shape[0] for shape in self.entry.hf_shapes]

    @cached_property
    def _their_rows(self) -> Tensor:
        """For each row of ours the row of the Hugging Face tensors, counted through all of them, int64 [rows]."""
        return self.entry.transform.to_ours(list(torch.arange(sum(self._sizes)).split(self._sizes)))

    def rows(self, start: int, stop: int) -> Tensor:
        """Float32 [at most stop - start, in]; rows that only pad are left out."""
        sizes, theirs = self._sizes, self._their_rows[start:stop]
        added = torch.zeros(len(theirs), self.entry.hf_shapes[0][1])
        for index, (a, b) in self.factors.items():
            first = sum(sizes[:index])
            here = ((theirs >= first) & (theirs < first + sizes[index])).nonzero().squeeze(1)
            added[here] = self.scale * (b[theirs[here] - first].float() @ a.float())
        return added


def hf_factors(linear: AdaptedLinear, read: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of a Hugging Face linear, as PEFT has them; padding cut off."""
    rows, columns = linear.hf_shape
    a = read(f"{linear.prefix}lora_A")[:, :columns]
    b = read(f"{linear.prefix}lora_B").flatten(0, 1)[:rows]  # [b, rows, r] -> [b * rows, r]
    if len(linear.entry.hf) == 1:  # else the adapter's rows are those of its own linear already
        (b,) = linear.entry.transform.to_hf(b)
    return a, b
