"""Where Transformer Engine's Python sources are, or how to get them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def te_python():
    folder = ROOT / ".te-python"
    if not (folder / "stamp").exists():
        pytest.fail("Transformer Engine's Python sources are not there; run: bash tests/te/install.sh")
    return folder
