"""All problems of a folder in one error that fits on a screen, whatever names are in it."""

import pytest

from megatron_v2pe.checkpoint.files.problems import raise_problems
from megatron_v2pe.core.errors import CheckpointError


def test_names_of_any_length_make_no_long_message():
    with pytest.raises(CheckpointError) as caught:
        raise_problems("folder: damaged", ["x" * 100_000, "short", *("y" * 5000 for _ in range(40))])
    text = str(caught.value)
    assert len(text) < 20 * 800
    assert "(100,000 characters)" in text
    assert "\n  short\n" in text
    assert text.endswith("... and 22 more")


def test_nothing_is_raised_for_no_problem():
    raise_problems("folder: damaged", [])
