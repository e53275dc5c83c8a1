"""A small dose of `tools/fuzz.py`: records and images."""

import pytest

from tests.support.fuzzing import images, records


@pytest.mark.parametrize(("cases", "count"), [(records, 400), (images, 250)], ids=["records", "images"])
def test_only_samples_and_named_errors(cases, count):
    outcomes = [cases.check(case) for case in cases.generate(12, count)]
    assert 0.05 < outcomes.count("ok") / count < 0.95  # both kinds are met
    assert list(cases.generate(12, 3)) == list(cases.generate(12, 3))
