"""For all tests: warm processes for each worker, no world that outlives its test, the same examples in each run."""

import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest
from hypothesis import settings

from tests.support.warm import warm_context


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        # The same examples in every run, so that a run is red for what changed; tests/run.sh says how others are drawn.
        settings.register_profile("same-draws", derandomize=True)
        settings.load_profile("same-draws")
    if "PYTEST_XDIST_WORKER" in os.environ:
        warm_context()
        forkserver.ensure_running()  # imports in its own process, while the first tests run here


@pytest.fixture(scope="module", autouse=True)
def _no_world_left() -> Iterator[None]:
    """A verb that was called in this process joins a world of one rank, as a process of its own would until its end."""
    yield
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from megatron_v2pe.parallel.topology import shutdown

        shutdown()
