"""Element-wise operations: which are compiled, and what is said when they cannot be."""

import logging

import pytest
import torch
from megatron.core.fusions import fused_bias_swiglu

from megatron_v2pe.assembly import compiled
from megatron_v2pe.assembly.compiled import choose_elementwise, compiled_ops, fuses_swiglu, trial
from megatron_v2pe.config.schema import ModelConfig, RuntimeConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.models.layers.elementwise import (
    ElementwiseOps,
    bias_gelu,
    scaled_dropped_residual,
    scaled_residual,
)


@pytest.mark.parametrize("elementwise", ["auto", "eager"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts without CUDA")
def test_a_cpu_runs_operation_by_operation(elementwise):
    assert choose_elementwise(RuntimeConfig(elementwise=elementwise)) == ElementwiseOps()


def test_a_gpu_that_cannot_compile_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(compiled, "trial", lambda device: "no compiler")
    with caplog.at_level(logging.WARNING):
        assert choose_elementwise(RuntimeConfig()) == ElementwiseOps()
    assert "torch.compile cannot run here (no compiler)" in caplog.text
    with pytest.raises(ConfigError, match=r"torch\.compile cannot run here: no compiler"):
        choose_elementwise(RuntimeConfig(elementwise="compiled"))


def test_without_compiling_mcores_swiglu_is_not_compiled_either(monkeypatch):
    plain = fused_bias_swiglu.swiglu
    monkeypatch.setattr(fused_bias_swiglu, "swiglu", torch.compile(plain))
    choose_elementwise(RuntimeConfig(elementwise="eager"))
    assert fused_bias_swiglu.swiglu is plain


def test_what_is_fused_by_itself(monkeypatch):
    assert [fuses_swiglu(ModelConfig(swiglu=way)) for way in ("auto", "fused", "plain")] == [
        False,
        True,
        False,
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [fuses_swiglu(ModelConfig(swiglu=way)) for way in ("auto", "fused", "plain")] == [
        True,
        True,
        False,
    ]


@pytest.mark.slow
def test_compiled_equals_plain():
    """On the CPU's compiler; float32, forward and backward to 1e-6."""
    assert trial(torch.device("cpu")) == ""
    ops = compiled_ops()
    torch.manual_seed(0)
    x, residual = (torch.randn(9, 4, 16, requires_grad=True) for _ in range(2))
    bias, scale = (torch.randn(16, requires_grad=True) for _ in range(2))
    mask = torch.tensor([0.0, 1.25, 1.25, 1.25]).view(1, 4, 1)
    pairs = [
        (ops.bias_gelu, bias_gelu, (x, bias)),
        (ops.scaled_residual, scaled_residual, (x, bias, scale, residual)),
        (ops.scaled_residual, scaled_residual, (x, None, scale, residual)),
        (ops.scaled_dropped_residual, scaled_dropped_residual, (x, bias, scale, mask, residual)),
    ]
    for fused, plain, arguments in pairs:
        found, wanted = fused(*arguments), plain(*arguments)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        leaves = [each for each in arguments if each is not None and each.requires_grad]
        weights = torch.randn_like(wanted)
        for mine, theirs in zip(
            torch.autograd.grad(found, leaves, weights),
            torch.autograd.grad(wanted, leaves, weights),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
