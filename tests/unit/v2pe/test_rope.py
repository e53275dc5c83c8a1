"""Rotary angles: golden numbers of the release, exactness far out, refusals."""

import math

import pytest
import torch

from megatron_v2pe.config.rope_scaling import RopeScaling
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
