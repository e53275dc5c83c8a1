"""core.env: what the launcher says, and what is refused."""

import os
from importlib.metadata import version

import pytest

from megatron_v2pe.core.env import (
    GPU_ENVIRONMENT,
    Launcher,
    buffer_size_name,
    child_environment,
    launcher,
    numeric_environment,
    prepare_gpu_environment,
    require_known_starter,
    slurm_job,
)
from megatron_v2pe.core.errors import ConfigError

FULL = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_torchrun_variables():
    assert launcher(FULL) == Launcher(rank=3, world_size=8, local_rank=1, master="node0:29500")


def test_no_launcher_is_a_world_of_one():
    assert launcher({"MASTER_ADDR": "left over"}) == Launcher(rank=0, world_size=1, local_rank=0, master=None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT not set"),
        ({"RANK": "8"}, "RANK is 8"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK is 'one'"),
    ],
)
def test_inconsistent_variables_are_refused(change, words):
    values = {name: value for name, value in {**FULL, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        launcher(values)


def test_slurm_job():
    assert slurm_job({"SLURM_JOB_ID": "17"}) == "17"
    assert slurm_job({}) is None


def test_child_environment_drops_the_rank(monkeypatch):
    for name, value in FULL.items():
        monkeypatch.setenv(name, value)
    child = child_environment(OMP_NUM_THREADS="1")
    assert child["OMP_NUM_THREADS"] == "1"
    assert not set(FULL) & set(child)
    assert "PATH" in child


@pytest.mark.parametrize(
    ("values", "program"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"PMI_SIZE": "4"}, "mpiexec"),
    ],
)
def test_several_tasks_that_do_not_know_of_each_other_are_refused(values, program):
    with pytest.raises(ConfigError, match=rf"{program} started \d processes.*torchrun.*launch/submit.py"):
        require_known_starter(values)
    require_known_starter({**values, "RANK": "0", "WORLD_SIZE": "4"})  # torchrun under srun


def test_a_batch_script_and_a_single_task_are_no_such_step():
    require_known_starter({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    require_known_starter({"SLURM_JOB_ID": "12", "SLURM_STEP_NUM_TASKS": "1"})


def test_only_what_changes_numbers_is_compared():
    values = {"NVTE_FLASH_ATTN": "0", "NCCL_ALGO": "Ring", "HOME": "/root", "OMP_NUM_THREADS": "4"}
    assert numeric_environment(values) == {"NVTE_FLASH_ATTN": "0", "NCCL_ALGO": "Ring"}


@pytest.mark.parametrize(
    ("torch", "name"),
    [
        ("2.6.0", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("2.8.1+cu128", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
        ("2.9.0a0+git1", "TORCH_FR_BUFFER_SIZE"),
        ("2.13.0+cpu", "TORCH_FR_BUFFER_SIZE"),
    ],
)
def test_the_size_of_dumps_goes_by_the_name_that_torch_knows(torch, name):
    assert buffer_size_name(torch) == name


def test_a_gpu_run_sets_what_nobody_has_set(monkeypatch):
    size = buffer_size_name(version("torch"))
    for name in (*GPU_ENVIRONMENT, size, "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    changes = prepare_gpu_environment("/runs/a")
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert os.environ[size] == "2000"
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/a/stacks/nccl_rank_"
    for name in changes:
        monkeypatch.delenv(name)
