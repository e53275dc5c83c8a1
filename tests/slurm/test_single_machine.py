"""Where SLURM cannot be had the tests of this folder are skipped, and say why."""

import os
import subprocess

import pytest

from tests.slurm import single_machine


@pytest.fixture
def lacking(monkeypatch):
    """A machine without SLURM."""
    monkeypatch.setattr(single_machine, "TOOLS", ("no-such-daemon",))


def test_without_root_the_missing_tools_are_named(lacking, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(
        single_machine.NoSlurmError, match="no-such-daemon not found, and only root on Debian"
    ):
        single_machine.install()


def test_without_a_network_the_reason_is_that_of_apt(lacking, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        single_machine.shutil, "which", lambda name, path=None: name if name == "apt-get" else None
    )
    failed = subprocess.CompletedProcess([], 100, stdout="", stderr="E: Temporary failure resolving 'deb'")
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: failed)
    with pytest.raises(single_machine.NoSlurmError, match="apt-get -q update failed: E: Temporary failure"):
        single_machine.install()
