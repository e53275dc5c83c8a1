"""Adapters of a model: which linears have them, their first values, and loading them on top of their base.

a checkpoint of adapters = checkpoint.json, hf/           as in every checkpoint
                           adapter.json                   which base, see `adapter_record`
                           state/                         adapters and parts that were trained whole, with their
                                                          optimizer state; nothing of the base
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_v2pe.checkpoint.files.adapter_record import find_base, read_record
from megatron_v2pe.checkpoint.files.folder import state_path
from megatron_v2pe.checkpoint.hf.name_map import Entry, NameMap, name_map
from megatron_v2pe.checkpoint.state.load import load_state
from megatron_v2pe.checkpoint.state.model_state import (
    load_expert_bias,
    load_into_model_chunks,
    load_model_weights,
    model_sharded_state_dict,
)
from megatron_v2pe.checkpoint.state.private_api import shards_in
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.lora import PARTS, Part, adapted_names, is_adapter_parameter, linear_names
from megatron_v2pe.config.schema import LoRAConfig
from megatron_v2pe.config.sections.parts import part_of
from megatron_v2pe.models.layers.lora import adapter_prefix
from megatron_v2pe.parallel.topology import Ranks


@dataclass(frozen=True, kw_only=True)
class AdaptedLinear:
    """A linear of the Hugging Face model that has an adapter.

    Attributes:
        part: part of the model.
        target: its name in `lora.targets`.
        hf_name: name of its module in the Hugging Face model.
        entry: the table's entry of its weight; other linears may share it.
        index: its place among the entry's tensors.
        prefix: of its state keys, which end in lora_A and lora_B.
    """

    part: Part
    target: str
    hf_name: str
    entry: Entry
    index: int
    prefix: str

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Rows and columns of the Hugging Face weight."""
        return self.entry.hf_shapes[self.index]


def adapted_linears(
    lora: LoRAConfig, arch: InternVLArchitecture, names: NameMap | None = None
) -> Iterator[AdaptedLinear]:
    """All linears with adapters, layer by layer, from the names table; names are those of a GitHub folder."""
    entries = (names or name_map(arch, "github")).by_ours.values()
    roles = {part: linear_names(part, arch) for part in PARTS}
    chosen = {part: adapted_names(lora, part, arch) for part in PARTS}
    for entry in entries:
        linear, _, kind = entry.ours.rpartition(".")
        part, role = part_of(linear), linear.rpartition(".")[2]
        if kind != "weight" or part not in roles or role not in roles[part]:  # type: ignore[index]
            continue
        for index, target in enumerate(roles[part][role]):  # type: ignore[index]
            if target in chosen[part]:  # type: ignore[index]
                yield AdaptedLinear(
                    part=part,  # type: ignore[arg-type]
                    target=target,
                    hf_name=entry.hf[index].removesuffix(".weight"),
                    entry=entry,
                    index=index,
                    prefix=adapter_prefix(linear, target),
                )


def load_weights(checkpoint: str | Path, model_chunks: Sequence[torch.nn.Module], *, ranks: Ranks) -> None:
    """Load the weights of any checkpoint, of a whole model or of adapters with their base. Collective.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded into this model.
    """
    record = read_record(checkpoint)
    if record is None:
        load_model_weights(checkpoint, model_chunks, ranks=ranks)
        return
    load_model_weights(find_base(checkpoint), model_chunks, ranks=ranks)
    states = model_sharded_state_dict(model_chunks, ranks, wanted=record.holds)
    load_into_model_chunks(model_chunks, load_state(state_path(checkpoint), states), wanted=record.holds)
    load_expert_bias(checkpoint, model_chunks)


def draw_adapters(
    model_chunks: Sequence[torch.nn.Module],
    *,
    lora: LoRAConfig,
    arch: InternVLArchitecture,
    seed: int,
    ranks: Ranks,
) -> None:
    """First values: A uniform in +-1/sqrt(in) (PEFT: kaiming_uniform_ with a = sqrt(5)), B zero.

    Each A is drawn whole from a generator seeded by its name, and cut, so every parallel layout starts with the same
    values. Padding of the heads of a split tower is zero.
    """
    shapes = {f"{linear.prefix}lora_A": linear.hf_shape for linear in adapted_linears(lora, arch)}
    for shard in shards_in(model_sharded_state_dict(model_chunks, ranks, wanted=is_adapter_parameter)):
        with torch.no_grad():
            shard.data.zero_()
            if shard.key in shapes:
                whole = _draw(shard.key, (shard.global_shape[0], shapes[shard.key][1]), seed)
                rows, columns = (
                    slice(start, start + size)
                    for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
                )
                values = whole[rows, columns]
                shard.data[:, : values.shape[1]].copy_(values)


def _draw(key: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
