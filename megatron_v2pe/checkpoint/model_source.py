"""Where the model of an answer comes from: a checkpoint of this package, or a Hugging Face folder as it is.

checkpoint/    checkpoint.json, hf/, state/          read_info, load_weights
InternVL2-2B/  config.json, *.safetensors            open_hf,   load_hf_weights     nothing is stored
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_v2pe.checkpoint.adapters.weights import load_weights
from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.convert.load_hf import load_hf_weights
from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_identity, checkpoint_lora
from megatron_v2pe.checkpoint.files.folder import INFO_FILE, hf_path, read_info
from megatron_v2pe.checkpoint.files.hashing import VerifyLevel
from megatron_v2pe.config.sections.lora import LoRAConfig
from megatron_v2pe.core.errors import CheckpointError, ConfigError
from megatron_v2pe.core.file_sample import sampled_digest
from megatron_v2pe.parallel.topology import Ranks

_WHOLE_BYTES = 8 * 2**20


def is_hf_folder(folder: str | Path) -> bool:
    """Whether a folder is a Hugging Face model, not a checkpoint of this package."""
    path = Path(folder)
    return not (path / INFO_FILE).is_file() and (path / "config.json").is_file()


def require_source(
    folder: str | Path, *, verify: VerifyLevel = "sizes", rank: int = 0, world_size: int = 1
) -> None:
    """Check a checkpoint as `read_info` does, or a Hugging Face folder as `import-hf` does.

    Raises:
        CheckpointError: everything that is wrong with it.
        ConfigError: hashes of a Hugging Face folder are asked for, which has none.
    """
    path = Path(folder)
    if not (path / INFO_FILE).is_file() and (path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: is a PEFT folder of adapters; `megatron-v2pe import-hf FOLDER CHECKPOINT --base "
            "CHECKPOINT_OF_THE_MODEL` imports it onto its model"
        )
    if not is_hf_folder(folder):
        read_info(folder, verify=verify, rank=rank, world_size=world_size)
        return
    if verify == "full":
        raise ConfigError(
            f"--verify-checkpoint is full, but {folder} is a Hugging Face folder, which holds no hashes; omit the "
            "option, or import the folder"
        )
    open_hf(folder)


def source_side_files(folder: str | Path) -> Path:
    """Folder of config.json and the tokenizer."""
    return Path(folder) if is_hf_folder(folder) else hf_path(folder)


def source_lora(folder: str | Path) -> LoRAConfig:
    """Adapters of a checkpoint; a Hugging Face folder has none.

    Raises:
        CheckpointError: see `checkpoint_lora`.
    """
    return LoRAConfig() if is_hf_folder(folder) else checkpoint_lora(folder)


def load_source(folder: str | Path, model_chunks: Sequence[torch.nn.Module], *, ranks: Ranks) -> None:
    """Load the weights of either kind. Collective.

    Raises:
        CheckpointError: they cannot be loaded into this model.
    """
    if is_hf_folder(folder):
        load_hf_weights(folder, model_chunks, ranks=ranks)
    else:
        load_weights(folder, model_chunks, ranks=ranks)


def source_digest(folder: str | Path) -> str:
    """What identifies a model: SHA-256 of `checkpoint.json`; of a Hugging Face folder that of names, sizes and bytes.

    Of its large files blocks count, see `file_sample`.
    """
    if not is_hf_folder(folder):
        return checkpoint_identity(folder)
    running = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        with open(path, "rb") as file:
            sample = sampled_digest(file, whole_bytes=_WHOLE_BYTES, blocks=16, block_bytes=2**16)
        running.update(f"{path.name} {sample}\n".encode())
    return running.hexdigest()


def written_at(folder: str | Path) -> int:
    """Time of its completion in nanoseconds since 1970; of a Hugging Face folder that of its newest file."""
    path = Path(folder)
    if not is_hf_folder(folder):
        return (path / INFO_FILE).stat().st_mtime_ns
    return max(each.stat().st_mtime_ns for each in path.iterdir() if each.is_file())
