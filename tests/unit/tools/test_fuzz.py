"""A small dose of the fuzzing of tools/fuzz.py, and its harness on cases that must fail."""

import os
import sys
import time
import types

import pytest

from megatron_v2pe.core.errors import DataError
from tests.support.fuzzing import harness


@pytest.mark.parametrize(("kind", "count"), [("checkpoints", 12), ("folders", 12), ("tokenizers", 60)])
def test_damage_ends_in_named_errors(kind, count):
    report = harness.fuzz(kind, count=count, seed=3)
    assert not report.failures, report.text()
    assert report.count == count
    assert report.endings["CheckpointError"] >= count // 4  # the changes do harm


class Misbehaving:
    """Case by case: fine, a named error, a foreign error, a crash, fine."""

    modules = ()

    def prepare(self, root):
        pass

    def mutate(self, root, folder, generator):
        return folder.name

    def run(self, folder):
        number = int(folder.name.removeprefix("case-"))
        if number == 1:
            raise DataError("named")
        if number == 2:
            raise ZeroDivisionError("foreign")
        if number == 3:
            os._exit(9)


def test_the_harness_reports_foreign_errors_and_crashes_and_goes_on(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "tests.support.fuzzing.images", types.SimpleNamespace(Fuzzer=Misbehaving)
    )
    report = harness.fuzz("images", count=5, seed=0, start="fork")
    assert report.endings == {"read": 2, "DataError": 1, "failed": 2}
    assert [(each.number, each.reason.split()[0]) for each in report.failures] == [
        (2, "ZeroDivisionError:"),
        (3, "the"),
    ]


def test_the_harness_ends_a_case_that_is_too_slow(monkeypatch):
    class Slow(Misbehaving):
        def run(self, folder):
            while True:
                time.perf_counter()

    monkeypatch.setattr(harness, "MAX_SECONDS", 0.2)
    monkeypatch.setitem(sys.modules, "tests.support.fuzzing.images", types.SimpleNamespace(Fuzzer=Slow))
    (failure,) = harness.fuzz("images", count=1, seed=0, start="fork").failures
    assert "TooSlowError" in failure.reason
