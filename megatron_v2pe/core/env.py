"""The only reader of the process environment.

Launchers (torchrun, srun with torchrun) describe a rank in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Everything else is configuration and belongs into the run's YAML file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError

_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Variables with which libraries choose other kernels or other precision.
_NUMERIC_NAMES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "MKL_CBWR",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_NUMERIC_PREFIXES = ("CUDNN_", "NVTE_", "UNFUSED_")
# Starters of several processes that do not describe a rank as torchrun does: number of processes, their program.
_OTHER_STARTERS = (
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("OMPI_COMM_WORLD_SIZE", "mpirun"),
    ("PMI_SIZE", "mpiexec"),
)


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """What the launcher says about this process.

    Attributes:
        rank: 0..world_size-1 over all nodes.
        world_size: processes of the run.
        local_rank: rank on this node, the index of its GPU.
        local_size: ranks on this node; 1 where the launcher does not say.
        master: "address:port" of the rendezvous, None when no launcher was used.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master: str | None = None


def launcher(environ: Mapping[str, str] | None = None) -> Launcher:
    """Read the launcher's variables; a process without any of RANK and WORLD_SIZE is a world of one.

    Args:
        environ: variables to read; the process's own when None.

    Raises:
        ConfigError: only some of the variables are set, or one is not a number in range.
    """
    values = os.environ if environ is None else environ
    if "RANK" not in values and "WORLD_SIZE" not in values:
        return Launcher()
    missing = [name for name in _LAUNCHER_NAMES if name not in values]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} not set while RANK or WORLD_SIZE is; start with torchrun, "
            "or unset all of them for a single process"
        )
    rank, world_size, local_rank = (_number(values, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not rank < world_size:
        raise ConfigError(f"environment: RANK is {rank}, but must lie in 0..WORLD_SIZE-1 = {world_size - 1}")
    master = f"{values['MASTER_ADDR']}:{_number(values, 'MASTER_PORT')}"
    local_size = max(1, _number(values, "LOCAL_WORLD_SIZE")) if "LOCAL_WORLD_SIZE" in values else 1
    return Launcher(
        rank=rank, world_size=world_size, local_rank=local_rank, local_size=local_size, master=master
    )


def require_known_starter(environ: Mapping[str, str] | None = None) -> None:
    """Refuse to be one of several processes that do not know of each other, as `srun -n 2` makes them.

    Raises:
        ConfigError: a step of several tasks without RANK and WORLD_SIZE.
    """
    values = os.environ if environ is None else environ
    if "RANK" in values or "WORLD_SIZE" in values:
        return
    for name, program in _OTHER_STARTERS:
        count = values.get(name, "1")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"environment: {program} started {count} processes ({name}), but RANK and WORLD_SIZE are not set, so "
                "that each of them would work alone and on the same files; start ranks with torchrun, one torchrun on "
                f"each node ({program} torchrun --nproc-per-node N --nnodes M ... -m megatron_v2pe VERB), or with "
                "launch/submit.py, which writes that command"
            )


def is_under_torchrun(environ: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun, or a launcher made from it, started this process and waits for it."""
    return "TORCHELASTIC_RUN_ID" in (os.environ if environ is None else environ)


def error_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """File from which torchrun reads this rank's error; None without torchrun."""
    text = (os.environ if environ is None else environ).get("TORCHELASTIC_ERROR_FILE", "")
    return Path(text) if text else None


def numeric_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables that are set and change what libraries compute."""
    values = os.environ if environ is None else environ
    return {
        name: values[name]
        for name in sorted(values)
        if name in _NUMERIC_NAMES or name.startswith(_NUMERIC_PREFIXES)
    }


def launch_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Folder that torchrun made on this node for one launch with all its restarts; None without torchrun.

    It names a file in it for each rank's error: FOLDER/attempt_N/LOCAL_RANK/error.json.
    """
    values = os.environ if environ is None else environ
    attempt = Path(values.get("TORCHELASTIC_ERROR_FILE", "")).parent.parent
    return attempt.parent if attempt.name.startswith("attempt_") else None


def api_key(environ: Mapping[str, str] | None = None) -> str:
    """Key that requests to a server must carry, from V2PE_API_KEY; "" where it is not set."""
    return (os.environ if environ is None else environ).get("V2PE_API_KEY", "").strip()


def rank_monitor_socket(environ: Mapping[str, str] | None = None) -> str | None:
    """Address of the monitor that NVIDIA's ft_launcher made for this rank; None without that launcher."""
    return (os.environ if environ is None else environ).get("FT_RANK_MONITOR_IPC_SOCKET")


def slurm_job(environ: Mapping[str, str] | None = None) -> str | None:
    """Id of the SLURM job this process belongs to, None outside of one."""
    return (os.environ if environ is None else environ).get("SLURM_JOB_ID")


GPU_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # kernels queue in the order of their calls, on which overlap relies
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # packs differ in size; fixed ones fragment
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}
_DUMPED_COLLECTIVES = "2000"
"""What training on a GPU wants of CUDA, torch's allocator and NCCL, which read it when they start."""


DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # of one size, or products of several streams differ
    "NCCL_ALGO": "Ring",  # chosen by size and topology otherwise
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # attention backward of Transformer Engine without atomic sums
}
"""What libraries read for `runtime.deterministic`."""


def buffer_size_name(torch_version: str) -> str:
    """The variable for how many collectives a dump shows; torch 2.9 renamed it, and warns of the name before."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return "TORCH_FR_BUFFER_SIZE" if (major, minor) >= (2, 9) else "TORCH_NCCL_TRACE_BUFFER_SIZE"


def prepare_gpu_environment(run_dir: str, *, deterministic: bool = False) -> dict[str, str]:
    """Set what training wants and nobody has set, before torch is imported; without a GPU it changes nothing.

    Args:
        run_dir: folder of the run; NCCL's dumps of collectives that timed out go into `stacks/` in it.
        deterministic: the run asks for the same bits in every run.

    Returns:
        What was set.
    """
    dumps = str(Path(run_dir) / "stacks" / "nccl_rank_")
    wanted = {
        **GPU_ENVIRONMENT,
        **(DETERMINISTIC_ENVIRONMENT if deterministic else {}),
        buffer_size_name(version("torch")): _DUMPED_COLLECTIVES,
        "TORCH_FR_DUMP_TEMP_FILE": dumps,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": dumps,
    }
    changes = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(changes)
    return changes


def set_where_unset(name: str, value: str) -> None:
    """Set a variable of this process that a library reads, unless whoever started it has set it."""
    os.environ.setdefault(name, value)


def child_environment(**changes: str) -> dict[str, str]:
    """A copy of the environment for a process that we start, without this rank's launcher variables."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_NAMES}
    return {**kept, **changes}


def forget_launcher() -> None:
    """Take the launcher's variables out of this process's environment, for libraries that would act on them.

    Call it after the process group has been made, which no longer needs them.
    """
    for name in (*_LAUNCHER_NAMES, "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        os.environ.pop(name, None)


@contextmanager
def without_variable(name: str) -> Iterator[None]:
    """Take a variable out of this process's environment for the block."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


def _number(values: Mapping[str, str], name: str) -> int:
    text = values[name]
    if not text.isdecimal():
        raise ConfigError(f"environment: {name} is {text!r}, but must be a whole number")
    return int(text)
