"""`model.fp8` in mcore's names; recomputed MLP chunks have rows that its products take."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer

from megatron_v2pe.assembly.build import memory_savings
from megatron_v2pe.assembly.mcore_config import language_config, vision_config
from megatron_v2pe.config.schema import ModelConfig, RunConfig
from megatron_v2pe.models.memory import _MlpChunks
from megatron_v2pe.parallel.plan import ParallelPlan
from tests.unit.config.test_validate import ARCH


@pytest.mark.parametrize(
    ("fp8", "wanted"),
    [
        ("none", (None, "delayed")),
        ("current", ("hybrid", "tensorwise")),
        ("blockwise", ("e4m3", "blockwise")),
    ],
)
def test_the_decoder_alone_has_a_recipe(fp8, wanted):
    config = RunConfig(model=ModelConfig(fp8=fp8))
    found = language_config(config, ARCH, ParallelPlan())
    assert (found.fp8, str(getattr(found.fp8_recipe, "value", found.fp8_recipe))) == wanted
    assert not found.fp8_param
    assert not found.fp8_dot_product_attention
    assert vision_config(config, ARCH, ParallelPlan()).fp8 is None


@pytest.mark.parametrize("skip", [0, 2])
def test_layers_at_the_ends_stay_in_bfloat16(skip):
    config = RunConfig(model=ModelConfig(fp8="current", fp8_skip_layers=skip))
    found = language_config(config, ARCH, ParallelPlan())
    layers = [number for number in range(6) if is_first_last_bf16_layer(found, number)]
    assert layers == ([0, 1, 4, 5] if skip else [])


@pytest.mark.parametrize(("fp8", "rows"), [("none", [34, 34, 32]), ("current", [48, 48, 4])])
def test_chunks_of_rows(fp8, rows):
    savings = memory_savings(ModelConfig(fp8=fp8, recompute="selective", mlp_chunks=3))
    chunks = _MlpChunks(number=3, row_multiple=savings.row_multiple, config=SimpleNamespace(fp8=None))
    assert [len(part) for part in chunks.split(torch.zeros(100, 1))] == rows
