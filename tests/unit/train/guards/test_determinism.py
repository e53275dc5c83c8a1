"""`runtime.deterministic`: what torch, mcore and the environment are set to, and that it ends with the run."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_v2pe.assembly.mcore_config import language_config
from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
from megatron_v2pe.core.env import DETERMINISTIC_ENVIRONMENT, prepare_gpu_environment
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.planning.measured_step import StepSizes
from megatron_v2pe.train.guards.determinism import deterministic_algorithms


@pytest.mark.parametrize("is_wanted", [True, False])
def test_torch_within_the_block_and_after_it(is_wanted):
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(is_wanted=is_wanted):
        assert torch.are_deterministic_algorithms_enabled() == (is_wanted or before)
        assert torch.utils.deterministic.fill_uninitialized_memory != is_wanted
    assert torch.are_deterministic_algorithms_enabled() == before
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("is_wanted", [True, False])
def test_mcore_and_the_environment(is_wanted, monkeypatch):
    config = RunConfig(runtime=RuntimeConfig(deterministic=is_wanted))
    arch = StepSizes().architecture()
    assert language_config(config, arch, resolve(config.parallel, 1)).deterministic_mode == is_wanted
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    changes = prepare_gpu_environment("/runs/a", deterministic=is_wanted)
    assert set(DETERMINISTIC_ENVIRONMENT) & set(changes) == (
        {"CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"} if is_wanted else set()
    )
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_a_run_that_does_not_want_it_never_imports_torchs_compiler():
    """Its import takes seconds, which a start that fails would spend after its message."""
    script = """
import sys
import torch
from megatron_v2pe.train.guards.determinism import deterministic_algorithms
known = "torch._inductor.config" in sys.modules
with deterministic_algorithms(is_wanted=False):
    pass
print(known, "torch._inductor.config" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
