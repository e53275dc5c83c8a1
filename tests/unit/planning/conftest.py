"""The benchmark's small step, on one rank in this process."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))  # bench_support


@pytest.fixture
def one_rank():
    """A world of one rank for a step, left afterwards."""
    from megatron_v2pe.parallel.topology import shutdown

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    shutdown()
    torch.set_num_threads(threads)
