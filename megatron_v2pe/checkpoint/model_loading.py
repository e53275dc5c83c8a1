"""From a checkpoint to a model on this rank's part of any parallel layout: built, and with its weights.

load_model             a checkpoint or a Hugging Face folder as it is,     answers, comparisons
                       adapters included
load_initial_weights   what a new run starts from, and new adapters       training, which builds its model itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.checkpoint.adapters.weights import draw_adapters, load_weights
from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.convert.load_hf import load_hf_weights
from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_lora
from megatron_v2pe.checkpoint.files.folder import is_hf_folder, read_info
from megatron_v2pe.checkpoint.files.hashing import VerifyLevel
from megatron_v2pe.checkpoint.state.model_state import load_model_weights
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.topology import ParallelContext, Ranks


def load_model(
    checkpoint: str | Path,
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
) -> list[InternVL]:
    """Build this rank's model chunks and load a checkpoint into them. Collective.

    Args:
        checkpoint: folder of a whole model, or of adapters, whose base is loaded too; or a Hugging Face folder.
        config: layout, positions, dtype; its adapters are replaced by the checkpoint's.
        arch: architecture of the model.
        context: sizes of the parallel axes and this rank's place on them.

    Raises:
        CheckpointError: the checkpoint or its base cannot be loaded into this model.
    """
    config = replace(config, lora=checkpoint_lora(checkpoint))
    model_chunks = build_model(config, arch, context)
    if is_hf_folder(checkpoint):
        load_hf_weights(checkpoint, model_chunks, ranks=context.ranks)
    else:
        load_weights(checkpoint, model_chunks, ranks=context.ranks)
    return model_chunks


def check_model(
    source: str | Path, *, verify: VerifyLevel = "sizes", rank: int = 0, world_size: int = 1
) -> None:
    """Check the files of what `load_model` would load, before anything is built.

    Args:
        source: a checkpoint, or a Hugging Face folder, whose headers, names and shapes are checked.
        verify: see `read_info`.
        rank: see `read_info`.
        world_size: see `read_info`.

    Raises:
        CheckpointError: everything that is wrong with it; or `verify` is `full` for a Hugging Face folder.
    """
    if not is_hf_folder(source):
        read_info(source, verify=verify, rank=rank, world_size=world_size)
        return
    if verify == "full":
        raise CheckpointError(
            f"{source}: is a Hugging Face folder, which keeps no hashes of its files to verify; leave out "
            "--verify-checkpoint, or import it first (import-hf)"
        )
    open_hf(source)


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
