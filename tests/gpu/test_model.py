"""A whole model on a GPU: Transformer Engine's layers against native ones, recorded numbers, a training run.

Strategy: one micro batch with images and V2PE positions in bfloat16 by both back ends, each measured against the native
model in float32; Transformer Engine may be at most twice as far away as native bfloat16 is. Then the command line:
golden cases in float32, five steps whose losses follow the CPU's, and a bfloat16 run that is resumed.
"""

import json
import shutil
import subprocess
import sys

import pytest

from megatron_v2pe.checkpoint.retention import step_path, write_latest
from megatron_v2pe.core.env import child_environment
from tests.gpu.bodies import NATIVE, TE, models
from tests.support import tiny
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.gpu

TWO_RANKS = [
    {"cp": 2},
    {"cp": 2, "cp_comm_type": "a2a"},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
]


def check(world_size, port, layouts):
    for found in run_ranks(models, world_size, port, layouts, timeout=280, is_warm=False):
        for layout, by_backend in zip(layouts, found, strict=True):
            for theirs, ours in zip(by_backend[TE], by_backend[NATIVE], strict=True):
                assert theirs < 2 * ours + 1e-3, f"{layout}: {by_backend}"
                assert ours < 0.1, f"{layout}: {by_backend}"


def test_model_on_one_rank(transformer_engine, port):
    check(1, port, [{}])


def test_model_on_two_ranks(transformer_engine, two_gpus, port):
    check(2, port, TWO_RANKS)


@pytest.mark.parametrize("group", ["model", "generation"])
def test_golden_cases(group):
    command = [sys.executable, "-m", "megatron_v2pe", "check-golden", str(tiny.GOLDEN_HF.parents[1])]
    done = subprocess.run(
        [*command, "--group", group], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_training_follows_the_cpu(tmp_path):
    """Five steps in float32; 1e-4 because kernels of both devices sum in another order, at every step anew."""
    checkpoint = tiny.import_golden(tmp_path / "checkpoint")
    meta = tiny.make_data(tmp_path / "data")
    native = ["parallel.attention_backend=native"]
    config = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=tmp_path / "gpu")
    tiny.train(config, native)
    command = tiny.train_command(config, [*native, f"runtime.run_dir={tmp_path / 'cpu'}"], ranks=1)
    hidden = child_environment(CUDA_VISIBLE_DEVICES="")
    subprocess.run(command, env=hidden, check=True, capture_output=True, timeout=280)
    gpu, cpu = (tiny.curve(tmp_path / name) for name in ("gpu", "cpu"))
    for found, wanted in zip(gpu, cpu, strict=True):
        assert found[0] == pytest.approx(wanted[0], rel=1e-4)
        assert found[1] == pytest.approx(wanted[1], rel=1e-3)


def test_bfloat16_training_is_taken_up_again(tmp_path):
    """Checkpoints from device memory, resumed generators, Adam of whatever is installed; `auto` chooses the layers.

    5e-3 because backward kernels may add in any order; on a CPU both runs have the same bits.
    """
    checkpoint = tiny.import_golden(tmp_path / "checkpoint")
    meta = tiny.make_data(tmp_path / "data")
    whole, again = tmp_path / "whole", tmp_path / "again"
    config = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=whole)
    common = ["runtime.dtype=bfloat16", "checkpoint.save_every=2", "checkpoint.keep=3"]
    tiny.train(config, common)
    shutil.copytree(step_path(whole, 2), step_path(again, 2))
    write_latest(again, 2)
    tiny.train(config, [*common, f"runtime.run_dir={again}"])
    lines = (again / "metrics.jsonl").read_text().splitlines()
    resumed = [json.loads(line)["loss"] for line in lines]
    assert resumed == pytest.approx([loss for loss, _ in tiny.curve(whole)[2:]], rel=5e-3)
