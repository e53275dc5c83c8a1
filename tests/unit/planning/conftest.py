"""A world of one rank in this process, for measured steps."""

import pytest
import torch

from megatron_v2pe.parallel.topology import shutdown


@pytest.fixture
def one_rank():
    """A world of one rank for a step, left afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    shutdown()
    torch.set_num_threads(threads)
