"""What a rank reports to ft_launcher's monitor: with a stand-in of the same methods and strictness for the client.

The real launcher and client are in tests/e2e/test_ft_launcher.py, where they are installed.
"""

import importlib
import importlib.util
import logging
from types import SimpleNamespace

import pytest

from megatron_v2pe.train.monitoring import rank_monitor
from megatron_v2pe.train.monitoring.rank_monitor import RankMonitor

ADDRESS = "FT_RANK_MONITOR_IPC_SOCKET"


class Client:
    """Notes calls; refuses what the real one or its server refuses."""

    def __init__(self, sections, calls):
        self.sections, self.calls = sections, calls
        self.open, self.is_initialized = set(), False

    def init_workload_monitoring(self):
        assert not self.is_initialized
        self.is_initialized = True
        self.calls.append("init")
        self.cfg = SimpleNamespace(
            initial_rank_heartbeat_timeout=3600.0,
            rank_heartbeat_timeout=2700.0,
            rank_section_timeouts=self.sections,
        )

    def send_heartbeat(self):
        assert self.is_initialized
        self.calls.append("heartbeat")

    def start_section(self, name):
        assert name in self.sections  # the server of 0.4.1 fails at the next look otherwise
        assert name not in self.open
        self.open.add(name)
        self.calls.append(f"start {name}")

    def end_section(self, name):
        self.open.remove(name)
        self.calls.append(f"end {name}")

    def shutdown_workload_monitoring(self):
        assert not self.open
        self.is_initialized = False
        self.calls.append("shutdown")


@pytest.fixture
def launched(monkeypatch):
    """A process that ft_launcher started, with time-outs for some sections; returns the calls of its client."""

    def launch(**sections):
        calls = []
        module = SimpleNamespace(RankMonitorClient=lambda: Client(sections, calls))
        monkeypatch.setenv(ADDRESS, "/tmp/socket")
        monkeypatch.setattr(logging.getLogger("megatron_v2pe"), "propagate", True)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(importlib, "import_module", lambda name: module)
        monkeypatch.setattr(rank_monitor, "version", lambda name: "0.4.1")
        return calls

    return launch


def test_every_step_is_reported_with_its_section(launched, caplog):
    calls = launched(setup=600.0, step=60.0, checkpointing=300.0)
    with caplog.at_level(logging.INFO), RankMonitor() as monitor:
        assert calls == ["init", "start setup"]
        monitor.beat(2)
        monitor.beat(3)
    expected = [
        "end setup",
        "heartbeat",
        "start step",
        "end step",
        "heartbeat",
        "start step",
        "end step",
        "shutdown",
    ]
    assert calls[2:] == expected
    assert "first within 3600.0 s, then 2700.0 s; sections setup 600.0 s, step 60.0 s" in caplog.text


def test_sections_without_a_time_out_are_left_out(launched):
    calls = launched(checkpointing=300.0)
    with RankMonitor() as monitor:
        monitor.beat(2)
    assert calls == ["init", "heartbeat", "shutdown"]


def test_an_error_in_a_step_closes_the_line(launched):
    calls = launched(setup=600.0)
    with pytest.raises(ZeroDivisionError), RankMonitor():
        raise ZeroDivisionError
    assert calls == ["init", "start setup", "end setup", "shutdown"]


def test_without_the_launcher_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(ADDRESS, raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("imported"))
    with RankMonitor() as monitor:
        monitor.beat(2)


def test_the_launcher_without_the_package_is_reported(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("megatron_v2pe"), "propagate", True)
    monkeypatch.setenv(ADDRESS, "/tmp/socket")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with RankMonitor() as monitor:
        monitor.beat(2)
    assert "nvidia_resiliency_ext is not installed here" in caplog.text
