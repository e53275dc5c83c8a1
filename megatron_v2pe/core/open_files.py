"""Enough open files for a run: sockets to other ranks, shards of checkpoints, loader workers, imported modules."""

from __future__ import annotations

import resource

from megatron_v2pe.core.errors import ConfigError

LEAST = 256
_WANTED = 65_536


def require_open_files(least: int = LEAST) -> None:
    """Raise this process's limit as far as it may, and refuse one that is too low.

    Args:
        least: files that must be possible.

    Raises:
        ConfigError: fewer are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft != resource.RLIM_INFINITY and soft < least:
        raise ConfigError(
            f"this process may open {soft} files (ulimit -n), but a run needs at least {least}; raise the limit "
            f"(ulimit -n {_WANTED}, LimitNOFILE of a service, --ulimit nofile of a container)"
        )
