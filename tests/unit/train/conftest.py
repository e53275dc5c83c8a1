"""Mixtures on disk."""

import pytest

from tests.support.mixture import empty_mixture, filled_mixture


@pytest.fixture
def mixture(tmp_path):
    """An empty mixture folder."""
    return empty_mixture(tmp_path)


@pytest.fixture
def filled(tmp_path):
    """24 samples with 0 to 3 images each, two data sets."""
    return filled_mixture(tmp_path)
