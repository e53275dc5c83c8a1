"""Everything that must be the same on all ranks, as a rank finds it before the model is built.

    configuration, field by field      versions, and this package's source     environment that changes numbers
    architecture                       checkpoint: its files                    data: see `data.identity`

Of a large file its size and blocks of its bytes count; `checkpoint.verify=full` reads all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import megatron_v2pe
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.env import launcher, numeric_environment
from megatron_v2pe.core.file_sample import sampled_digest
from megatron_v2pe.data.identity import data_identity

_PACKAGES = (
    "megatron_v2pe",
    "torch",
    "megatron-core",
    "transformer_engine",
    "apex",
    "numpy",
    "pillow",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "av",
)
_WHOLE_BYTES = 8 * 2**20


def rank_facts(config: RunConfig, arch: InternVLArchitecture) -> dict[str, str]:
    """Facts of this rank, by names that a person understands.

    Raises:
        DataError: the meta json cannot be used.
    """
    checkpoint = config.model.hf_path or config.model.checkpoint
    return {
        **config_facts(config),
        **dict(_software()),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "WORLD_SIZE": str(launcher().world_size),
        **{f"environment {name}": value for name, value in numeric_environment().items()},
        **dict(_flat("config.json", dataclasses.asdict(arch))),
        **folder_facts(Path(checkpoint)),
        **dict(_data(config)),
    }


def _data(config: RunConfig) -> Iterator[tuple[str, str]]:
    for name in ("meta", "validation", "retrieval"):
        path = getattr(config.data, name)
        if path:
            yield from data_identity(path, name=f"data.{name}").items()


def config_facts(config: RunConfig) -> dict[str, str]:
    """`section.key` -> value, of every field."""
    return dict(_flat("", dataclasses.asdict(config)))


def folder_facts(folder: Path) -> dict[str, str]:
    """Size and digest of every file of a checkpoint or Hugging Face folder.

    A file that cannot be read is a fact as well; whoever needs it will report it.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): _file_identity(path) for path in paths}


def _file_identity(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return sampled_digest(file, whole_bytes=_WHOLE_BYTES, blocks=16, block_bytes=2**16)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _software() -> Iterator[tuple[str, str]]:
    yield "python version", platform.python_version()
    for package in _PACKAGES:
        try:
            yield f"{package} version", version(package)
        except PackageNotFoundError:
            yield f"{package} version", "not installed"
    yield "megatron_v2pe source", _source_digest(Path(megatron_v2pe.__file__).parent)
    yield "deterministic algorithms", str(torch.are_deterministic_algorithms_enabled())
    yield "float32 matmul precision", torch.get_float32_matmul_precision()


def _source_digest(folder: Path) -> str:
    """Digest of the package's Python files: clones of one version number may differ."""
    running = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        running.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return running.hexdigest()[:16]


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            yield from _flat(full, value)
        else:
            yield full, repr(value)
