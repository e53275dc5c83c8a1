"""The same bits in every run of one layout (`runtime.deterministic`), for as long as a run lives.

What CUDA's libraries read from the environment is set before torch is imported (`core.env`); mcore is configured in
assembly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_algorithms(*, is_wanted: bool) -> Iterator[None]:
    """Within the block torch refuses operations whose result may differ between runs, or chooses others.

    Nothing is touched where it is not wanted: torch's setter imports its compiler, which takes seconds.
    """
    if not is_wanted:
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Nothing reads memory before it is written (tests poison it); filling it would cost a pass over every tensor.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
