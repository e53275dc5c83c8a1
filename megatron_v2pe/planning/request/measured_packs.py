"""Packs of the run's own data: lengths, tiles and supervised tokens of the first planned steps.

data.meta --plan_mixture (measures once, then reads its cache)--> packs of steps 0..n --> mean and fullest
"""

from __future__ import annotations

from pathlib import Path

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.data.loader import plan_mixture
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.planning.request.workload import Pack

MAX_PACKS = 512


def measured_packs(config: RunConfig, arch: InternVLArchitecture, hf_folder: Path) -> list[Pack]:
    """The packs that the run starts with, at most 512 and no more than it trains on.

    Raises:
        ConfigError, DataError: see `plan_mixture`.
    """
    indexes, plan = plan_mixture(config, sample_settings(config, arch, hf_folder))
    packs: list[Pack] = []
    for step in range(config.optim.steps):
        if len(packs) >= MAX_PACKS:
            break
        for planned in plan.packs_of_step(step):
            rows = [(indexes[sample.dataset], sample.row) for sample in planned.samples]
            packs.append(
                Pack(
                    document_lengths=tuple(int(index.num_tokens[row]) for index, row in rows),
                    num_tiles=sum(int(index.num_tiles[row]) for index, row in rows),
                    supervised_tokens=sum(int(index.num_supervised[row]) for index, row in rows),
                    source="measured",
                )
            )
    return packs
