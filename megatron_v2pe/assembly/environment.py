"""What this machine has, and what will therefore be used; `megatron-v2pe doctor` prints it.

The choices are made where they are needed (`backend_modules.py`, `optim/fused_adam.py`,
`parallel/runtime/cpu_runtime.py`); this file makes the same checks and reports the results.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from megatron_v2pe.core.env import slurm_job
from megatron_v2pe.parallel.runtime import cpu_runtime

Finding = tuple[str, str]


def describe_environment() -> Iterator[Finding]:
    """What was found, as (name, finding)."""
    yield "python", platform.python_version()
    yield (
        "cpu",
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores",
    )
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "cuda", _cuda()
    yield "nccl", _nccl()
    yield "transformer engine", _version("transformer_engine") or "not installed (extra 'gpu')"
    yield "apex", _apex()
    yield "megatron-core", _version("megatron-core") or "not installed"
    yield "slurm", _slurm()


def describe_choices() -> Iterator[Finding]:
    """What will be used, as (name, choice and reason)."""
    on_gpu, engine = torch.cuda.is_available(), has_module("transformer_engine")
    importlib.import_module("megatron.core")  # the CPU runtime decides when this is first imported
    if cpu_runtime.is_active():
        yield "runtime", "megatron-core on CPU, ranks talk over gloo (no CUDA device)"
    else:
        yield "runtime", "CUDA, ranks talk over NCCL"
    if on_gpu and engine:
        yield "attention and layers", "Transformer Engine in bfloat16, native layers in float32"
    else:
        reason = "no CUDA device" if not on_gpu else "Transformer Engine is not installed"
        yield "attention and layers", f"mcore's local layers, native ring attention ({reason})"
    yield "optimizer Adam", adam_source()


def adam_source() -> str:
    """Whose Adam megatron-core's distributed optimizer gets."""
    if not torch.cuda.is_available():
        return "this package's FusedAdam (no CUDA device)"
    if has_module("transformer_engine"):
        return "Transformer Engine's FusedAdam"
    if has_nvidia_apex():
        return "apex's FusedAdam"
    return "this package's FusedAdam (neither Transformer Engine nor apex is installed)"


def has_module(name: str) -> bool:
    """Whether a top-level module is installed; nothing is imported."""
    return importlib.util.find_spec(name) is not None


def has_nvidia_apex() -> bool:
    """Whether NVIDIA's apex with its CUDA kernels is installed, not the unrelated package of that name."""
    return has_module("amp_C") and _apex_folder_has_optimizers()


def _apex_folder_has_optimizers() -> bool:
    spec = importlib.util.find_spec("apex")
    folders = spec.submodule_search_locations if spec is not None else None
    return any((Path(folder) / "optimizers" / "fused_adam.py").is_file() for folder in folders or ())


def _apex() -> str:
    if not has_module("apex"):
        return "not installed (optional, from NVIDIA's source)"
    if not _apex_folder_has_optimizers():
        return "an unrelated package named apex is installed; NVIDIA's comes from its source only. Not used"
    modules = "with" if has_module("amp_C") else "without"
    return f"NVIDIA's, {_version('apex') or 'unknown version'}, {modules} CUDA kernels"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        )
        return f"no device ({built})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {len(names)} device(s): {', '.join(sorted(set(names)))}"


def _nccl() -> str:
    if not torch.cuda.is_available():
        return "not used without a CUDA device"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _slurm() -> str:
    job = slurm_job()
    if job is not None:
        return f"inside job {job}"
    path = shutil.which("sinfo")
    if path is None:
        return "not found"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or f"{path} --version printed nothing: {done.stderr.strip()}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
