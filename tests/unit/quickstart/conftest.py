import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


@pytest.fixture(scope="session", autouse=True)
def _scripts_importable():
    sys.path.insert(0, str(QUICKSTART))
    yield
    sys.path.remove(str(QUICKSTART))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, _scripts_importable):
    """The quickstart's Hugging Face folder."""
    import make_checkpoint

    folder = tmp_path_factory.mktemp("quickstart") / "hf"
    make_checkpoint.write_checkpoint(folder, seed=0)
    return folder
