"""From a checkpoint to a model on this rank's part of any parallel layout: built, and with its weights.

load_model             a checkpoint or Hugging Face folder as it is       answers, comparisons
load_initial_weights   what a new run starts from, and new adapters       training, which builds its model itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.checkpoint.adapters.weights import draw_adapters
from megatron_v2pe.checkpoint.convert.load_hf import load_hf_weights
from megatron_v2pe.checkpoint.model_source import load_source, source_lora
from megatron_v2pe.checkpoint.state.model_state import load_model_weights
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.topology import ParallelContext, Ranks


def load_model(
    checkpoint: str | Path,
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
) -> list[InternVL]:
    """Build this rank's model chunks and load their weights. Collective.

    Args:
        checkpoint: checkpoint of a whole model, or of adapters, whose base is loaded too; or a Hugging Face folder.
        config: layout, positions, dtype; its adapters are replaced by the checkpoint's.
        arch: architecture of the model.
        context: sizes of the parallel axes and this rank's place on them.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded into this model.
    """
    config = replace(config, lora=source_lora(checkpoint))
    model_chunks = build_model(config, arch, context)
    load_source(checkpoint, model_chunks, ranks=context.ranks)
    return model_chunks


def load_initial_weights(
    model_chunks: Sequence[InternVL], config: RunConfig, arch: InternVLArchitecture, *, ranks: Ranks
) -> None:
    """Fill a run's model with `model.checkpoint` or `model.hf_path`, and draw the first values of its adapters.

    Collective.

    Raises:
        CheckpointError: the weights cannot be loaded into this model.
    """
    if config.model.hf_path:
        load_hf_weights(config.model.hf_path, model_chunks, ranks=ranks)
    else:
        load_model_weights(config.model.checkpoint, model_chunks, ranks=ranks)
    draw_adapters(model_chunks, lora=config.lora, arch=arch, seed=config.runtime.seed, ranks=ranks)
