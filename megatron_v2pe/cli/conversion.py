"""What the conversion verbs share: a byte counter, and a refusal to run many times at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError


@contextmanager
def byte_progress(verb: str) -> Iterator[Callable[[int], None]]:
    """Give a function that is told each batch of bytes and counts them on stderr, if that is a terminal.

    Raises:
        ConfigError: torchrun started several processes, which would all write the same folder.
    """
    if launcher().world_size > 1:
        raise ConfigError(
            f"{verb} converts in one process, {launcher().world_size} were started; leave torchrun out"
        )
    with tqdm(desc=verb, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:

        def advance(num_bytes: int) -> None:
            bar.update(num_bytes)

        yield advance
