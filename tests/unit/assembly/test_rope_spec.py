"""`position.rope_precision` of a run file reaches the angles of its model."""

import torch

from megatron_v2pe.assembly.mcore_config import rope_spec
from megatron_v2pe.config.schema import PositionConfig, RunConfig
from megatron_v2pe.planning.measured_step import StepSizes
from megatron_v2pe.v2pe.rope import rope_angles


def test_reference_differs_from_exact_at_a_million_positions():
    arch = StepSizes().architecture()
    units = torch.tensor([3, 1_000_003]) * arch.tokens_per_tile + 1
    cosines = {}
    for precision in ("exact", "reference"):
        position = PositionConfig(mode="v2pe_fixed", stride=1, rope_precision=precision)
        spec = rope_spec(RunConfig(position=position), arch)
        cosines[precision] = rope_angles(units, spec, rope_length=1_000_004, has_fractions=True).cos()
    near, far = (cosines["exact"] - cosines["reference"]).abs().amax(1).tolist()
    assert near < 1e-6  # float32 products of small numbers
    assert far > 1e-4  # float32 knows positions of a million to 1/16
