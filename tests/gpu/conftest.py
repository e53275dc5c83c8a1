"""What a GPU test needs, and the reason when it is not there."""

import importlib.util
import os
import socket

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """A CUDA device; asked for by name (`-m gpu`), so its absence is a failure and not a skip."""
    if not torch.cuda.is_available():
        pytest.fail("these tests need a CUDA device; without -m gpu they are not run")


@pytest.fixture(scope="session")
def transformer_engine(gpu):
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.fail("Transformer Engine is not installed; install the extra 'gpu'")


@pytest.fixture
def port():
    """A free port for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def two_gpus(gpu):
    """Two ranks can meet over NCCL; skipped where there is one GPU that cannot be shared."""
    if torch.cuda.device_count() < 2 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        pytest.skip("one GPU; NCCL 2.30 or newer shares it when NCCL_MULTI_RANK_GPU_ENABLE=1 is set")
