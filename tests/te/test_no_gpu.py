"""A host without a GPU in a container that has Transformer Engine: everything that runs on CPU still does.

Strategy: a whole training run with Transformer Engine 2.11's Python importable and no device. megatron-core decides by
imports alone and chooses Transformer Engine's FusedAdam and gradient clipping, which need CUDA. Strictness: the losses
are those of the same run without Transformer Engine, to the bit.
"""

import pytest

from tests.support import tiny
from tests.support.spawn import run_ranks
from tests.te.bodies import train_without_a_gpu

pytestmark = pytest.mark.te
OVERRIDES = ["optim.steps=2", "optim.warmup_steps=1"]


def test_training_without_a_gpu_beside_transformer_engine(te_python, tmp_path):
    config = tiny.prepared(tmp_path)
    ((chosen, used),) = run_ranks(
        train_without_a_gpu, 1, te_python, config, OVERRIDES, timeout=120, is_warm=False
    )
    assert chosen.startswith("transformer_engine"), "this test is about mcore's choice of that Adam"
    assert used == "megatron_v2pe.assembly.optim.fused_adam"
    tiny.train(config, [*OVERRIDES, f"runtime.run_dir={tmp_path / 'without'}"])
    assert tiny.curve(tmp_path / "run") == tiny.curve(tmp_path / "without")
