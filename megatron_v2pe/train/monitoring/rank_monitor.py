"""Reports this rank's progress to NVIDIA's ft_launcher, where that launcher started the run; else it does nothing.

    ft_launcher (nvidia-resiliency-ext)             starts ranks as torchrun does, and a monitor process for each
        monitor of the rank  <--heartbeat-----      after every step
                             <--sections------      `setup`: from the process groups to the end of the first step,
                                                    `step`: every later one, with its wait for data and its checkpoint

The monitor kills a rank whose heartbeat or section is late, also one that is stopped; how late is the launcher's matter
(--ft-rank-heartbeat-timeout and its like). Our own watchdog runs beside it and says where ranks hang.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from importlib.metadata import version
from types import TracebackType
from typing import Any

from megatron_v2pe.core.env import rank_monitor_socket

logger = logging.getLogger(__name__)

_PACKAGE = "nvidia_resiliency_ext"
_SETUP, _STEP = "setup", "step"  # as Megatron-LM calls them, so that files for its launches fit


class RankMonitor:
    """The rank's line to its monitor, while it is entered; does nothing where there is none."""

    def __init__(self) -> None:
        self._client: Any = None
        self._section = ""

    def __enter__(self) -> RankMonitor:
        if rank_monitor_socket() is None:
            return self
        if importlib.util.find_spec(_PACKAGE) is None:
            logger.warning(
                "ft_launcher started this run, but %s is not installed here, so that its monitors get no "
                "heartbeats; hangs end by runtime.hang_timeout_s alone",
                _PACKAGE,
            )
            return self
        client = importlib.import_module(f"{_PACKAGE}.fault_tolerance").RankMonitorClient()
        client.init_workload_monitoring()
        self._client = client
        self._begin(_SETUP)
        logger.info(
            "ft_launcher's monitors (nvidia-resiliency-ext %s) get a heartbeat of every step: %s",
            version("nvidia-resiliency-ext"),
            _described(client.cfg),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._end()
            self._client.shutdown_workload_monitoring()

    def beat(self, step: int) -> None:
        """Step `step` is under way now."""
        if self._client is not None:
            self._end()
            self._client.send_heartbeat()
            self._begin(_STEP)

    def _begin(self, section: str) -> None:
        """Open a section that the launcher has a time-out for; a monitor ends at one that it does not know."""
        if section in self._client.cfg.rank_section_timeouts:
            self._client.start_section(section)
            self._section = section

    def _end(self) -> None:
        if self._section:
            self._client.end_section(self._section)
            self._section = ""


def _described(settings: Any) -> str:
    """The launcher's time-outs in words."""
    first, later = settings.initial_rank_heartbeat_timeout, settings.rank_heartbeat_timeout
    sections = [f"{name} {seconds} s" for name, seconds in settings.rank_section_timeouts.items()]
    return f"heartbeats, first within {first} s, then {later} s; sections {', '.join(sections) or 'none'}"
