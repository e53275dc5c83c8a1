"""Attention on real kernels against full float64 attention: Transformer Engine's through our adapter, and the native.

Strategy: the bodies that run on CPU elsewhere (`tests/te`, `tests/distributed/test_context_attention.py`). Strictness:
the reference has the same bfloat16 inputs, so what is left is rounding of probabilities, outputs, gradients to 8 bits,
in the ring once more for each merge: 2e-2 of a tensor's norm, 4e-2 of its entries of size 1. float32: 1e-5.
"""

import pytest
import torch

from tests.gpu.bodies import native_attention, te_attention, windows_and_sinks
from tests.support.spawn import run_ranks
from tests.te.test_context_parallel import PACKS

pytestmark = pytest.mark.gpu

TE_TOLERANCE = 2e-2
NATIVE_TOLERANCE = {torch.bfloat16: 4e-2, torch.float32: 1e-5}
LENGTHS = ((4, 4, 8), (12, 4, 40, 4, 28), (64,), (512, 128, 1024))
HEADS = ((4, 4), (4, 2), (8, 2))
WINDOW_TOLERANCE = {
    torch.bfloat16: 1e-1,
    torch.float32: 2e-5,
}  # of entries up to 8; each merged block is rounded once


def te_cases(comms):
    return [(documents, comm) for comm in comms for documents in PACKS.values()]


def native_cases(comms):
    return [
        (comm, lengths, *heads, dtype)
        for comm in comms
        for lengths in LENGTHS
        for heads in HEADS
        for dtype in NATIVE_TOLERANCE
    ]


def check_te(world_size, port, comms):
    cases = te_cases(comms)
    for rank, errors in enumerate(
        run_ranks(te_attention, world_size, port, cases, timeout=240, is_warm=False)
    ):
        for case, found in zip(cases, errors, strict=True):
            assert max(found) < TE_TOLERANCE, f"rank {rank}, {case}: out, dq, dk, dv off by {found}"


def check_native(world_size, port, comms):
    cases = native_cases(comms)
    for rank, errors in enumerate(
        run_ranks(native_attention, world_size, port, cases, timeout=240, is_warm=False)
    ):
        for case, found in zip(cases, errors, strict=True):
            assert max(found) < NATIVE_TOLERANCE[case[-1]], f"rank {rank}, {case}: off by {found}"


def test_transformer_engine_on_one_rank(transformer_engine, port):
    check_te(1, port, ["p2p"])


def test_native_on_one_rank(port):
    check_native(1, port, ["p2p"])


def check_windows(world_size, port, comms):
    cases = [
        (comm, window, dtype, has_sink)
        for comm in comms
        for window, has_sink in ((None, True), (8, False), (11, True))
        for dtype in WINDOW_TOLERANCE
    ]
    for rank, errors in enumerate(
        run_ranks(windows_and_sinks, world_size, port, cases, timeout=240, is_warm=False)
    ):
        for case, found in errors.items():
            assert max(found) < WINDOW_TOLERANCE[case[2]], f"rank {rank}, {case}: off by {found}"


def test_windows_and_sinks_on_one_rank(port):
    check_windows(1, port, ["p2p"])


def test_windows_and_sinks_on_two_ranks(two_gpus, port):
    check_windows(2, port, ["p2p", "all_gather", "a2a", "by_document"])


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_transformer_engine_on_two_ranks(transformer_engine, two_gpus, port, comm):
    check_te(2, port, [comm])


@pytest.mark.parametrize("comm", ["p2p", "all_gather", "a2a"])
def test_native_on_two_ranks(two_gpus, port, comm):
    check_native(2, port, [comm])
