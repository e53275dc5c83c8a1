"""A whole model of Transformer Engine's layers: it builds, has our parameters, and computes what the native one does.

Strategy: mcore's wrappers and Transformer Engine 2.11's own Python (linears, norms, attention) run on reference
kernels, whose calls are bound to the compiled module's declared parameters; loss and every gradient of one micro
batch with images and V2PE positions are compared with the native layers' on the same rank. Strictness: relative 1e-6
for the loss, 1e-5 of a gradient's largest entry, float32.
"""

import pytest

from tests.support.spawn import run_ranks
from tests.te import engine
from tests.te.bodies import model_cases

pytestmark = pytest.mark.te

LAYOUTS = {
    "cp2 p2p": {"cp": 2},
    "cp2 a2a": {"cp": 2, "cp_comm_type": "a2a"},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sequence_parallel": True},
}
KERNELS = {
    *("fused_attn_bwd", "fused_attn_fwd", "generic_gemm", "get_fused_attn_backend"),
    *("layernorm_bwd", "layernorm_fwd", "rmsnorm_bwd", "rmsnorm_fwd"),
}
RING = {
    *("thd_grad_correction", "thd_out_correction", "thd_read_half_tensor"),
    *("thd_read_second_half_lse", "thd_second_half_lse_correction"),
}


@pytest.fixture(scope="module")
def models(te_python):
    return run_ranks(model_cases, 2, te_python, LAYOUTS, timeout=240, is_warm=False)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_equals_the_native_one(models, layout):
    for rank in models:
        found = rank[layout]
        theirs, ours = found["shapes"]
        assert theirs == ours, "a checkpoint would not fit both"
        theirs, ours = found["losses"]
        assert abs(theirs - ours) < 1e-6 * abs(ours)
        assert {name: error for name, error in found["gradients"].items() if not error < 1e-5} == {}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layers_are_transformer_engines(models, layout):
    for rank in models:
        modules, calls = set(rank[layout]["modules"]), set(rank[layout]["calls"])
        assert {"RotaryTEAttention", "TEDotProductAttention", "TEColumnParallelLinear"} <= modules
        assert "NativeContextAttention" not in modules
        assert calls >= KERNELS
    used = set.union(*(set(rank[layout]["calls"]) for rank in models))
    assert used - KERNELS == (RING if layout == "cp2 p2p" else set())


def test_drift_of_a_call_is_seen():
    module = engine.compiled_module({"thd_read_half_tensor": lambda tensor, cu_seqlens, half_idx: half_idx})
    assert module.thd_read_half_tensor(1, 2, 3) == 3
    with pytest.raises(TypeError, match="thd_read_half_tensor"):
        module.thd_read_half_tensor(1, 2)
    with pytest.raises(TypeError, match="thd_read_half_tensor"):
        module.thd_read_half_tensor(tensor=1, cu_seqlens=2, half_idx=3)  # declared without keywords
    with pytest.raises(engine.NoReferenceError, match="rmsnorm_fwd runs on a GPU only"):
        module.rmsnorm_fwd(*range(8))


def test_the_folder_holds_python_only(te_python):
    assert {path.name.partition("-")[0] for path in te_python.iterdir()} == {"stamp", "transformer_engine"}
    assert [path for path in te_python.rglob("*.so*")] == []
