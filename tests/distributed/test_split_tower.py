"""A vision tower split over tensor parallel ranks gives the golden losses and gradients, heads padded or not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_v2pe.checkpoint.convert.export_hf import export_hf
from megatron_v2pe.checkpoint.convert.import_hf import import_hf
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.verification.golden.ranks import run_on_local_ranks
from megatron_v2pe.verification.golden.runner import select_groups
from tests.support import tiny
from tests.support.hf_folders import random_folder

GOLDEN = Path(__file__).parent.parent / "golden"
pytestmark = pytest.mark.distributed


def check(folder, family, **parallel):
    groups = select_groups(folder, name="model", model_only=True)
    rows = run_on_local_ranks(
        folder, groups, family=family, parallel=ParallelConfig(vision="tensor", **parallel)
    )
    assert [row for row in rows if row.status != "pass"] == []
    assert len(rows) > 20


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2sp"])
def test_split_tower_equals_the_release(sequence_parallel):
    check(GOLDEN, "a", tp=2, sequence_parallel=sequence_parallel)


def five_head_checkpoint(folder):
    """Small random weights; a 6B-style tower (RMSNorm, q/k norm, no qkv bias) of five heads, odd on two ranks."""
    vision = {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "norm_type": "rms_norm",
        "qk_normalization": True,
        "qkv_bias": False,
    }
    hf = random_folder(folder / "hf", shards=1, dtype=torch.float32, llm={}, vision=vision)
    path = hf / "model-00001-of-00001.safetensors"
    tensors = load_file(path)
    is_scale = lambda name: "norm" in name or name.endswith((".ls1", ".ls2"))  # noqa: E731
    small = {name: 1 + 0.1 * x if is_scale(name) else 0.1 * x for name, x in tensors.items()}
    save_file({name: x.contiguous() for name, x in small.items()}, path, metadata={"format": "pt"})
    import_hf(hf, folder / "checkpoint")
    return folder / "checkpoint"


def test_padded_heads_train_like_whole_ones_and_are_not_exported(tmp_path):
    """Losses and gradient norms of five updates (float32, 1e-5 relative), then an export of the real shapes."""
    checkpoint = five_head_checkpoint(tmp_path)
    meta = tiny.make_data(tmp_path / "data")
    run = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=tmp_path / "whole")
    tiny.train(run, [])
    split = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.vision=tensor"]
    tiny.train(run, [*split, f"runtime.run_dir={tmp_path / 'split'}"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path / "split"), tiny.curve(tmp_path / "whole"), rtol=1e-5)
    for name in ("whole", "split"):
        export_hf(tmp_path / name / "checkpoints" / "step_00000005", tmp_path / f"{name}_hf")
    whole, split_up = (
        load_file(tmp_path / f"{name}_hf" / "model-00001-of-00001.safetensors") for name in ("whole", "split")
    )
    assert {name: x.shape for name, x in whole.items()} == {name: x.shape for name, x in split_up.items()}
    worst = max(float((whole[name] - split_up[name]).abs().max()) for name in whole)
    # Adam moves a weight by up to lr (1e-3) where its gradient is noise around zero.
    assert worst < 2e-3
