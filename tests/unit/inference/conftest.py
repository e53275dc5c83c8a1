"""One imported golden checkpoint for all tests of this folder, and one float64 engine for each module."""

import pytest
import torch

from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from tests.support.prompts import FAMILY, GOLDEN, load_engine


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    target = tmp_path_factory.mktemp("inference") / "imported"
    import_hf(GOLDEN / FAMILY, target)
    return target


@pytest.fixture(scope="module")
def loaded(checkpoint):
    torch.set_num_threads(1)
    return load_engine(checkpoint, dtype="float64")


@pytest.fixture
def engine(loaded):
    """The engine without memories of other tests."""
    loaded.chunk_tokens, loaded.kv = 32, "model"
    loaded.documents.clear()
    loaded.documents.max_tokens = 0
    yield loaded
    loaded.runner.problem = ""
