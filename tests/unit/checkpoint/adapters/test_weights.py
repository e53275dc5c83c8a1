"""Adapters and the names table: every target of every family is a linear that the Hugging Face model has."""

import dataclasses
import math

import pytest
import torch

from megatron_v2pe.assembly.adapters import fused_parts
from megatron_v2pe.checkpoint.adapters.merge import RowProducts, hf_factors
from megatron_v2pe.checkpoint.adapters.weights import _draw, adapted_linears
from megatron_v2pe.checkpoint.hf.name_map import name_map
from megatron_v2pe.config.arch.families import FAMILIES as KNOWN
from megatron_v2pe.config.lora import PARTS, check_lora, linear_names, parts_trained_whole
from megatron_v2pe.config.schema import LoRAConfig, ModelConfig, RunConfig
from megatron_v2pe.core.errors import ConfigError
from tests.support.parity_cases import ARCH

EVERYWHERE = LoRAConfig(language_rank=4, vision_rank=3, projector_rank=2)
FAMILIES = sorted(KNOWN)


def of(family):
    language = dataclasses.replace(ARCH.language, architecture=family, qkv_bias=family.startswith("Qwen2"))
    return dataclasses.replace(ARCH, language=language)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_names_of_modules(family):
    """One adapter for each two-dimensional weight of a layer or the projector, under its own name."""
    arch = of(family)
    names = name_map(arch)
    linears = list(adapted_linears(EVERYWHERE, arch))
    for linear in linears:
        assert linear.hf_name == linear.target or linear.hf_name.endswith(f".{linear.target}")
        assert linear.hf_shape == names.hf_shape(f"{linear.hf_name}.weight")
    in_layers = {
        name
        for name, entry in names.by_hf.items()
        if ".linear_" in entry.ours and len(names.hf_shape(name)) == 2
    }
    assert {f"{linear.hf_name}.weight" for linear in linears} == in_layers
    assert len({linear.prefix for linear in linears}) == len(linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_products_by_our_rows_are_those_by_hugging_face_rows(family):
    """The rows that adapters add in the model are, through the table, B A of each Hugging Face linear."""
    arch = of(family)
    generator = torch.Generator().manual_seed(3)
    by_weight = {}
    for linear in adapted_linears(EVERYWHERE, arch):
        by_weight.setdefault(linear.entry.ours, []).append(linear)
    for weight, linears in by_weight.items():
        part, role = weight.split(".")[0], weight.split(".")[-2]
        parts, _ = fused_parts(part, role, linear_names(part, arch)[role], arch)
        rank = EVERYWHERE.rank_of(part)
        stored = {}
        for linear, fused in zip(linears, parts, strict=True):
            rows, columns = linear.hf_shape
            blocks = (fused.blocks, rows // fused.blocks, rank)
            stored[f"{linear.prefix}lora_A"] = torch.randn(rank, columns, generator=generator)
            stored[f"{linear.prefix}lora_B"] = torch.randn(blocks, generator=generator)
        factors = {linear.index: hf_factors(linear, stored.__getitem__) for linear in linears}
        products = RowProducts(linears[0].entry, factors, scale=2.0)
        rows = sum(shape[0] for shape in linears[0].entry.hf_shapes)
        whole = torch.cat([products.rows(start, start + 7) for start in range(0, rows, 7)])
        theirs = linears[0].entry.transform.to_hf(whole)
        for linear in linears:
            a, b = factors[linear.index]
            torch.testing.assert_close(theirs[linear.index], 2.0 * b @ a, rtol=1e-5, atol=1e-5)


def test_first_values_are_those_of_peft():
    """kaiming_uniform_ with a = sqrt(5): uniform in +-1/sqrt(in); equal for a name and seed, others otherwise."""
    drawn = _draw("x", (64, 400), 1)
    reference = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    bound = 1 / math.sqrt(400)
    assert drawn.abs().max() <= bound
    assert 0.98 * bound < drawn.abs().max()
    torch.testing.assert_close(drawn.std(), reference.std(), rtol=0.02, atol=0)
    assert torch.equal(drawn, _draw("x", (64, 400), 1))
    assert not torch.equal(drawn, _draw("y", (64, 400), 1))
    assert not torch.equal(drawn, _draw("x", (64, 400), 2))


def test_a_part_with_adapters_is_not_trained_whole():
    config = RunConfig(lora=LoRAConfig(vision_rank=2), model=ModelConfig(freeze_projector=True))
    assert parts_trained_whole(config) == ("language",)
    assert parts_trained_whole(RunConfig()) == PARTS


@pytest.mark.parametrize("targets", [(), ("w1", "attn.qkv", "mlp1.3")])
def test_targets_that_exist_are_accepted(targets):
    lora = dataclasses.replace(EVERYWHERE, targets=targets)
    check_lora(RunConfig(lora=lora), of("InternLM2ForCausalLM"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("q_proj",), "'q_proj', but no part"), (("wqkv",), "lora.vision_rank is 3, but none of lora.targets")],
)
def test_targets_that_do_not_exist_are_refused(targets, message):
    lora = dataclasses.replace(EVERYWHERE, targets=targets)
    with pytest.raises(ConfigError, match=message):
        check_lora(RunConfig(lora=lora), of("InternLM2ForCausalLM"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"language_rank": -1}, "lora.language_rank is -1"),
        ({"language_rank": 1, "dropout": 1.0}, r"lora.dropout is 1.0, but must lie in \[0, 1\)"),
        ({"alpha": 4.0}, "lora.alpha is 4.0, but no part has adapters"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**values)
