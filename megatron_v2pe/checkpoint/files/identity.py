"""What the files of a model are, so that an evaluation or a session never continues with another one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_v2pe.checkpoint.files.adapter_record import checkpoint_identity
from megatron_v2pe.checkpoint.files.folder import INFO_FILE, is_hf_folder
from megatron_v2pe.core.file_sample import sampled_digest


def model_identity(source: str | Path) -> str:
    """What a model's files are, in 64 letters: other weights or another config.json give another.

    Of a checkpoint, whose `checkpoint.json` has hashes of all files, it is the hash of that; of a Hugging Face folder
    a hash of all files, of which large ones are sampled.

    Raises:
        OSError: a file vanished.
    """
    if not is_hf_folder(source):
        return checkpoint_identity(source)
    running = hashlib.sha256()
    for path in sorted(path for path in Path(source).rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            digest = sampled_digest(file, whole_bytes=2**20, blocks=16, block_bytes=2**16)
        running.update(f"{path.relative_to(source)}\0{digest}\0".encode())
    return running.hexdigest()


def model_written(source: str | Path) -> int:
    """When a model was completed, in nanoseconds since 1970: `checkpoint.json`, or the newest file of a HF folder.

    Raises:
        OSError: a file vanished.
    """
    if not is_hf_folder(source):
        return (Path(source) / INFO_FILE).stat().st_mtime_ns
    return max(path.stat().st_mtime_ns for path in Path(source).rglob("*") if path.is_file())
