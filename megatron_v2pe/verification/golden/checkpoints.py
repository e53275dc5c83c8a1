"""Golden checkpoints, imported once per process and before it joins other ranks.

`import-hf` writes a checkpoint alone; once a process is part of a world, mcore makes every save a collective
one. Each rank therefore imports for itself (they are tiny), all folders at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.pipeline import split_layers
from megatron_v2pe.config.schema import ParallelConfig, RunConfig
from megatron_v2pe.config.validate import check_experts, check_model_split
from megatron_v2pe.core.errors import CheckpointError, ConfigError

Imported = Path | CheckpointError


@functools.lru_cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="golden-")


@functools.lru_cache
def imported_checkpoints(folder: Path, family: str | None) -> dict[str, Imported]:
    """Checkpoint folder of each key under `folder/ckpt`, or why this version cannot read it.

    Args:
        folder: golden folder.
        family: prefix of the keys, None for all.
    """
    target = Path(tempfile.mkdtemp(dir=_scratch().name))
    # A folder may hold a tokenizer alone, for the cases of text.
    paths = sorted({path.parent for path in (folder / "ckpt").glob("*/*.safetensors")})
    return {
        path.name: _import(path, target / path.name) for path in paths if path.name.startswith(family or "")
    }


def _import(hf_folder: Path, target: Path) -> Imported:
    try:
        read_architecture(hf_folder)
    except CheckpointError as error:
        return error
    import_hf(hf_folder, target)
    return target


def fitting_layout(parallel: ParallelConfig, arch: InternVLArchitecture) -> ParallelConfig:
    """The plan, made to suit a checkpoint.

    Layers that do not divide over the stages get a layout of their own; experts under tensor parallelism run with
    sequence parallelism, as in training, where they cannot do without.
    """
    layout = split_layers(arch.language.num_layers, num_stages=parallel.pp)
    if layout:
        parallel = dataclasses.replace(parallel, pipeline_layout=layout)
    if arch.language.experts is not None and parallel.tp > 1:
        parallel = dataclasses.replace(parallel, sequence_parallel=True)
    return parallel


def is_left_out(parallel: ParallelConfig, checkpoint: Imported) -> bool:
    """Expert parallelism is for checkpoints with experts."""
    if parallel.ep == 1 or isinstance(checkpoint, CheckpointError):
        return False
    return read_architecture(hf_path(checkpoint)).language.experts is None


def require_fit(folder: Path, *, family: str | None, parallel: ParallelConfig) -> None:
    """Refuse a layout that a checkpoint cannot be spread over, before ranks are started.

    Raises:
        ConfigError: names the checkpoint, and the sizes that are possible.
    """
    for path in sorted((folder / "ckpt").glob("*/config.json")):
        if not path.parent.name.startswith(family or ""):
            continue
        try:
            arch = read_architecture(path.parent)
        except CheckpointError:
            continue  # reported as unsupported
        fitted = fitting_layout(parallel, arch)
        try:
            check_model_split(fitted, arch)
            if arch.language.experts is not None:
                check_experts(RunConfig(parallel=fitted), arch)
        except ConfigError as error:
            raise ConfigError(
                f"check-golden: {path.parent.name}: {error}; or leave it out with --family"
            ) from None
