"""Training from the command line: equal on every axis, and resumed after a kill to the last bit."""

import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support import tiny


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Imported checkpoint, data, and the curve of an uninterrupted single-rank run."""
    root = tmp_path_factory.mktemp("train")
    config = tiny.prepared(root, run="single", num_sets=3)
    tiny.train(config, [])
    return root, config, tiny.curve(root / "single")


def test_the_loss_falls(setup):
    _, _, curve = setup
    assert len(curve) == 5
    assert curve[-1][0] < curve[0][0]


def test_every_number_of_a_line_has_a_row_on_the_metrics_page(setup):
    """docs/metrics.md explains every number that a step's line has, and no other."""
    root, *_ = setup
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    rows = re.findall(r"^\| (`[^|]*`) \|", page.read_text(encoding="utf-8"), re.M)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    for line in tiny.metrics(root / "single"):
        assert sorted(set(documented) - NOT_OF_A_DENSE_MODEL) == sorted(line)


NOT_OF_A_DENSE_MODEL = {
    *("aux_loss", "z_loss", "expert_load_max", "expert_load_by_layer"),
    *("busiest_layer", "tokens_per_expert", "drop_rate", "expert_bias_max"),
    "flops_share_by_branch",
}
LAYOUTS = [
    ["parallel.cp=2"],
    ["parallel.cp=2", "parallel.cp_comm_type=all_gather"],
    ["parallel.cp=2", "parallel.cp_comm_type=a2a"],
    ["parallel.tp=2"],
    ["parallel.tp=2", "parallel.sequence_parallel=true"],
    ["parallel.pp=2"],
    ["parallel.pp=2", "parallel.vpp=2", "parallel.pipeline_layout=E|t|t|L"],
    [],  # dp 2
    pytest.param(["parallel.cp=2", "parallel.cp_sharding=by_document"], marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    LAYOUTS,
    ids=["cp2", "cp2gather", "cp2a2a", "tp2", "tp2sp", "pp2", "vpp2", "dp2", "documents"],
)
def test_two_ranks_give_the_curve_of_one(setup, overrides, tmp_path):
    """Losses and gradient norms, float32: sums in another order, carried by five updates to 1e-5 relative."""
    root, config, wanted = setup
    tiny.train(config, [*overrides, f"runtime.run_dir={tmp_path}"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path), wanted, rtol=1e-5)
    by_source = [
        (mine[key], one[key])
        for mine, one in zip(tiny.metrics(tmp_path), tiny.metrics(root / "single"), strict=True)
        for key in ("loss_by_source", "weight_by_source", "tokens_by_source")
    ]
    for mine, one in by_source:
        assert mine == pytest.approx(one, rel=1e-5)  # equal names, too


def test_losses_of_the_data_sets_add_up_to_the_loss(setup):
    """Float32 sums of each pack against float64 sums of its tokens; a data set without a sample has no number."""
    root, *_ = setup
    lines = tiny.metrics(root / "single")
    for line in lines:
        parts = [line["weight_by_source"][name] * loss for name, loss in line["loss_by_source"].items()]
        assert sum(parts) == pytest.approx(line["loss"], rel=1e-6)
        assert sum(line["tokens_by_source"].values()) == line["tokens"]
        assert sum(line["weight_by_source"].values()) == pytest.approx(1.0)
    present = [set(line["loss_by_source"]) for line in lines]
    assert set().union(*present) == {"tiny", "tiny/1", "tiny/2"}
    assert any(len(names) < 3 for names in present)


def wait_for_step(run_dir, step, process, *, saved, patience_s=60):
    """Until a step is done and the checkpoint of an earlier one, which is written meanwhile, is complete."""
    metrics, mark = run_dir / "metrics.jsonl", run_dir / f"checkpoints/step_{saved:08d}/checkpoint.json"
    for _ in range(20 * patience_s):
        if mark.exists() and len(metrics.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in {patience_s} s")


def test_killed_and_started_again_equals_uninterrupted(setup, tmp_path):
    """kill -9 after a step beyond the last checkpoint; what follows is equal bit for bit."""
    _, config, wanted = setup
    overrides = [f"runtime.run_dir={tmp_path}", "checkpoint.save_every=2"]
    process = subprocess.Popen(
        tiny.train_command(config, overrides, ranks=1), stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path, 3, process, saved=2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = tiny.train(config, overrides)
    assert "resumed from" in log
    assert tiny.curve(tmp_path) == wanted


@pytest.mark.distributed
def test_a_checkpoint_continues_under_another_layout(setup, tmp_path):
    """Two steps at one rank, the rest at cp 2; three updates after a resume show a wrong optimizer state."""
    _, config, wanted = setup
    run = [f"runtime.run_dir={tmp_path}", "checkpoint.save_every=2"]
    process = subprocess.Popen(tiny.train_command(config, run, ranks=1), stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 3, process, saved=2)
    process.kill()
    process.wait()
    assert "resumed from" in tiny.train(config, [*run, "parallel.cp=2"], ranks=2)
    np.testing.assert_allclose(tiny.curve(tmp_path), wanted, rtol=1e-5)


@pytest.mark.slow
def test_without_save_every_a_killed_run_continues_from_the_clock(setup, tmp_path):
    """checkpoint.save_minutes alone: here a hundredth of a second, so that every step is saved."""
    _, config, wanted = setup
    overrides = [f"runtime.run_dir={tmp_path}", "checkpoint.save_minutes=0.0002"]
    process = subprocess.Popen(
        tiny.train_command(config, overrides, ranks=1), stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path, 3, process, saved=1, patience_s=300)
    process.send_signal(signal.SIGKILL)
    process.wait()
    log = tiny.train(config, overrides)
    assert "resumed from" in log
    assert "every 0.0002 minutes (checkpoint.save_minutes)" in log
    assert tiny.curve(tmp_path) == wanted
