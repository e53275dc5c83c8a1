"""Memory options: what they become, and which combinations are refused with a way out."""

import pytest
import torch

from megatron_v2pe.assembly.build import memory_savings
from megatron_v2pe.config.schema import ModelConfig, VisionConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.offload import ActivationOffload


@pytest.mark.parametrize(
    ("model", "mlp_chunks"),
    [
        (ModelConfig(), 0),
        (ModelConfig(recompute="selective"), 1),
        (ModelConfig(recompute="selective", mlp_chunks=4), 4),
        (ModelConfig(recompute="full"), 0),  # the whole layer is recomputed already
        (ModelConfig(recompute="full", mlp_chunks=4), 4),
    ],
)
def test_pieces_of_the_mlp(model, mlp_chunks):
    assert memory_savings(model).mlp_chunks == mlp_chunks


def test_loss_chunk_is_passed_on():
    assert memory_savings(ModelConfig(loss_chunk_tokens=17)).loss_chunk_tokens == 17


def test_offloading_needs_a_gpu(monkeypatch):
    model = ModelConfig(recompute="full", offload_activations=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"model\.offload_activations is true, but this host has no GPU"):
        memory_savings(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(memory_savings(model).offload, ActivationOffload)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(mlp_chunks=0), "model.mlp_chunks is 0, but must be at least 1"),
        (dict(mlp_chunks=2), "model.recompute is 'none' and all chunks would be kept"),
        (dict(offload_activations=True), "model.recompute is 'none' and only layer inputs are moved"),
        (
            dict(offload_activations=True, recompute="selective"),
            "set model.recompute to full, or offload_activations to false",
        ),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


def test_negative_slices_are_refused():
    with pytest.raises(ConfigError, match=r"vision\.micro_batch_tiles is -1, but must be >= 0"):
        VisionConfig(micro_batch_tiles=-1)
