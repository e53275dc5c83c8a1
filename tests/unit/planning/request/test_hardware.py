"""Peaks by the names that drivers give; boards with other clocks are not taken for the fast ones."""

import pytest

from megatron_v2pe.planning.request.hardware import A100, H100, known_peak_tflops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", H100.peak_tflops),
        ("NVIDIA H200", H100.peak_tflops),
        ("NVIDIA A100-SXM4-80GB", A100.peak_tflops),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla V100-SXM2-32GB", None),
        ("", None),
    ],
)
def test_peak_by_name(name, peak):
    assert known_peak_tflops(name) == peak
