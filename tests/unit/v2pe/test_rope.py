"""Rotary angles: golden numbers of the release, exactness far out, refusals."""

import math

import pytest
import torch

from megatron_v2pe.config.arch.rope_scaling import RopeScaling
from megatron_v2pe.v2pe.rope import RopeSpec, apply_rotary, ntk_base, rope_angles


def spec(**changes):
    return RopeSpec(**{"dim": 128, "base": 1e6, "fractional": True, **changes})


def angles_at(position, **changes):
    units = torch.tensor([round(position * 256)])
    return rope_angles(units, spec(**changes), rope_length=1)[0]


@pytest.mark.parametrize(
    ("position", "pair", "cos"),
    [
        (5.25, 0, 0.5120855),
        (5.25, 1, -0.4633015),
        (133.0, 32, 0.9911685),
        (1000.00390625, 0, 0.5591448),
        (65535.99609375, 0, -0.7191259),
    ],
)
def test_release_tables(position, pair, cos):
    """float32 tables of the release at theta 1e6; both precisions meet them at these positions (1e-6)."""
    assert angles_at(position)[pair].cos().item() == pytest.approx(cos, abs=1e-6)
    assert angles_at(position, precision="reference")[pair].cos().item() == pytest.approx(cos, abs=1e-6)


def test_exact_angles_are_right_at_a_million_and_the_reference_is_not():
    position = 1_048_575 + 1 / 256
    exact = math.cos(position)
    assert angles_at(position)[0].cos().item() == pytest.approx(exact, abs=3e-7)
    assert abs(angles_at(position, precision="reference")[0].cos().item() - exact) > 1e-4


def test_dynamic_ntk_base_of_the_release():
    ntk = spec(scaling=RopeScaling(kind="dynamic", factor=2.0, trained_positions=32768))
    assert ntk_base(ntk, 45000) == pytest.approx(1762110.98, rel=1e-8)
    assert ntk_base(ntk, 32768) == 1e6


@pytest.mark.parametrize("precision", ["exact", "reference"])
def test_scaling_changes_angles(precision):
    plain = angles_at(100.0, precision=precision)
    linear = angles_at(100.0, precision=precision, scaling=RopeScaling(kind="linear", factor=2.0))
    assert torch.allclose(linear, angles_at(50.0, precision=precision), atol=1e-6)
    units = torch.tensor([100 * 256])
    ntk = spec(precision=precision, scaling=RopeScaling(kind="dynamic", factor=2.0, trained_positions=64))
    assert not torch.allclose(rope_angles(units, ntk, rope_length=101)[0], plain, atol=1e-3)


def test_fractions_are_refused_not_floored():
    with pytest.raises(ValueError, match="fractional positions"):
        rope_angles(torch.tensor([256, 300]), spec(fractional=False), rope_length=3)
    rope_angles(torch.tensor([256, 512]), spec(fractional=False), rope_length=3)


def test_float_positions_are_refused():
    with pytest.raises(ValueError, match="int64"):
        rope_angles(torch.tensor([1.0]), spec(), rope_length=3)


def test_rotation_keeps_norms_and_depends_on_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 128, dtype=torch.float64), torch.randn(1, 1, 128, dtype=torch.float64)

    def score(first, second):
        turned = [apply_rotary(x, angles_at(p)[None]) for x, p in ((query, first), (key, second))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7.25, 3.0) == pytest.approx(score(100_007.25, 100_003.0), abs=1e-5)  # float32 tables
    assert score(7.25, 3.0) != pytest.approx(score(7.0, 3.0), abs=1e-3)


def test_reference_rounds_the_tables_in_bf16():
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    angles = angles_at(133.0)[None]
    assert not torch.equal(apply_rotary(x, angles), apply_rotary(x, angles, round_tables=True))


SHORT, LONG = (1.0, 1.5), (2.0, 4.0)
LONGROPE = RopeScaling(kind="longrope", trained_positions=4096, short_factors=SHORT, long_factors=LONG)


@pytest.mark.parametrize("precision", ["exact", "reference"])
@pytest.mark.parametrize(("rope_length", "factors"), [(4096, SHORT), (4097, LONG)])
def test_longrope_chooses_its_factors_by_the_longest_position(precision, rope_length, factors):
    phi = spec(dim=4, base=1e4, scaling=LONGROPE, precision=precision)
    angles = rope_angles(torch.tensor([256 * 3 + 64]), phi, rope_length=rope_length)[0]
    wanted = [3.25 / factors[0], 3.25 * 1e-2 / factors[1]]
    assert angles.tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("precision", ["exact", "reference"])
def test_llama3_divides_slow_frequencies_and_keeps_fast_ones(precision):
    """Of Llama 3.1: wavelengths 6.3, 1.2e3, 4.4e3 and 8.4e5 against bounds 2048 and 8192 of M = 8192."""
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        trained_positions=8192,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    llama = spec(dim=128, base=5e5, scaling=scaling, precision=precision)
    plain = spec(dim=128, base=5e5, precision=precision)
    one = torch.tensor([256])
    ratio = rope_angles(one, llama, rope_length=9)[0] / rope_angles(one, plain, rope_length=9)[0]
    assert ratio[:26].tolist() == pytest.approx([1.0] * 26, rel=1e-6)
    turns = 8192 * 5e5 ** (-64 / 128) / (2 * math.pi)  # 1.84 turns of frequency 32, between the bounds
    kept = (turns - 1.0) / 3.0
    assert ratio[32].item() == pytest.approx(kept + (1 - kept) / 8, rel=1e-5)
    assert ratio[40:].tolist() == pytest.approx([1 / 8] * 24, rel=1e-6)


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("precision", ["exact", "reference"])
def test_yarn_keeps_the_first_indices_and_divides_the_last(precision, truncates):
    """GPT-OSS: the ramp runs from index 8.09 to 17.4, or with rounded ends from 8 to 18; fractions keep it."""
    scaling = RopeScaling(
        kind="yarn", factor=32.0, trained_positions=4096, attention_factor=1.35, truncates=truncates
    )
    yarn = spec(dim=64, base=150000.0, scaling=scaling, precision=precision, fractional=True)
    plain = spec(dim=64, base=150000.0, precision=precision, fractional=True)
    for units in (64, 256):  # a quarter of a position, and one
        angles = [rope_angles(torch.tensor([units]), each, rope_length=9)[0] for each in (yarn, plain)]
        ratio = angles[0] / angles[1]
        assert ratio[:9].tolist() == pytest.approx([1.0] * 9, rel=1e-6)
        low, high = (8.0, 18.0) if truncates else (8.092779, 17.398043)
        divided = (12 - low) / (high - low)
        assert ratio[12].item() == pytest.approx(1.0 - divided + divided / 32, rel=1e-5)
        assert ratio[18:].tolist() == pytest.approx([1 / 32] * 14, rel=1e-5)


def test_attention_factor_scales_and_is_rounded_with_the_tables():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 8, generator=generator)
    angles = torch.rand(5, 4, generator=generator) * 6
    scaled = apply_rotary(x, angles, scale=1.19)
    assert torch.allclose(scaled, 1.19 * apply_rotary(x, angles), atol=1e-6)
    half = apply_rotary(x.bfloat16(), torch.zeros(5, 4), scale=1.19, round_tables=True)
    factor = torch.tensor(1.19).bfloat16().float()
    assert torch.equal(half, (x.bfloat16().float() * factor).bfloat16())
