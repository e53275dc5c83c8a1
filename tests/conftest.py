"""One server of warm processes for each worker of a parallel run, started before any test asks for it."""

import os
from multiprocessing import forkserver

from tests.support.warm import warm_context


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        warm_context()
        forkserver.ensure_running()  # imports in its own process, while the first tests run here
