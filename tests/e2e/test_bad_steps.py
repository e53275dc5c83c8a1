"""A loss or gradient that is not finite, a loss too large: no rank applies the step, its packs are recorded.

Strategy: a fault is put into one rank of a real run (tests/support/injected.py). That nothing was applied shows in the
next run: with all steps bad the checkpoint written must hold the very weights the run started from.
"""

import json
import math
import shutil

import pytest

from tests.support import tiny
from tests.support.warm import run_verb


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad_steps")
    return tiny.prepared(root)


def run(config, run_dir, *, kind, rank, steps, ranks=1, overrides=()):
    fault = (kind, rank, ",".join(map(str, steps)))
    train = (config, f"runtime.run_dir={run_dir}", *overrides)
    return run_verb(*fault, *train, ranks=ranks, entry="tests.support.injected:run")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "rank", "ranks"),
    [
        ("loss", 0, 1),
        ("gradient", 0, 1),
        pytest.param("loss", 1, 2, marks=pytest.mark.distributed),
        pytest.param("gradient", 1, 2, marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_a_bad_step_is_recorded_and_the_run_goes_on(config, tmp_path, kind, rank, ranks):
    done = run(config, tmp_path, kind=kind, rank=rank, steps=[2, 4], ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["is_applied"] for line in metrics] == [True, False, True, False, True]
    assert all(math.isfinite(line["loss"]) for line in metrics if line["is_applied"])
    assert all((line["loss"] is None) == (kind == "loss") for line in metrics if not line["is_applied"])
    recorded = lines(tmp_path / "bad_steps.jsonl")
    assert [line["step"] for line in recorded] == [2, 4]
    packs = recorded[0]["packs"]
    assert len(packs) == 2  # the global batch, each pack once
    assert all(pack["samples"] for pack in packs)
    if kind == "loss":
        guilty = [(pack["dp_rank"], pack["micro_batch"]) for pack in packs if not pack["loss_is_finite"]]
        assert guilty == [(rank, 0)]


GUARD = ["runtime.max_loss_ratio=2", "runtime.loss_window=2"]


@pytest.mark.parametrize(
    ("rank", "ranks"), [(0, 1), pytest.param(1, 2, marks=[pytest.mark.distributed, pytest.mark.slow])]
)
def test_a_spike_of_the_loss_is_left_out_also_right_after_a_restart(config, tmp_path, rank, ranks):
    overrides = [*GUARD, "checkpoint.save_every=3"]
    done = run(config, tmp_path, kind="spike", rank=rank, steps=[4], ranks=ranks, overrides=overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    first = lines(tmp_path / "metrics.jsonl")
    assert [line["is_applied"] for line in first] == [True, True, True, False, True]
    (recorded,) = lines(tmp_path / "bad_steps.jsonl")
    assert recorded["step"] == 4
    assert 2 * min(line["loss"] for line in first) < recorded["loss_limit"] < float(recorded["loss"])
    assert all(pack["samples"] and pack["loss_is_finite"] for pack in recorded["packs"])
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000005")
    overrides.append("checkpoint.fallback=true")
    done = run(config, tmp_path, kind="spike", rank=rank, steps=[1], ranks=ranks, overrides=overrides)
    assert "at step 3" in done.stderr, done.stderr[-4000:]
    again = lines(tmp_path / "metrics.jsonl")
    assert [(line["loss"], line["is_applied"]) for line in again] == [
        (line["loss"], line["is_applied"]) for line in first
    ]


def test_nothing_is_applied_by_a_run_of_bad_steps_only(config, tmp_path):
    only = ["optim.steps=1", "optim.warmup_steps=0"]
    done = run(config, tmp_path, kind="gradient", rank=0, steps=[1], overrides=only)
    assert done.returncode == 0, done.stderr[-4000:]
    newest = tmp_path / "checkpoints" / "step_00000001"
    equal = run_verb("verify", tiny.GOLDEN_HF, newest)
    assert " 0 different, 0 left out" in equal.stdout, equal.stdout + equal.stderr
    tiny.train(
        config, [f"runtime.run_dir={tmp_path}"]
    )  # from a checkpoint of an optimizer that has done nothing
    assert all(line["is_applied"] for line in lines(tmp_path / "metrics.jsonl")[1:])


def test_too_many_in_a_row_stop_the_run_and_leave_its_good_checkpoint(config, tmp_path):
    every = ["checkpoint.save_every=1", "checkpoint.keep=1", "runtime.max_bad_steps=2"]
    done = run(config, tmp_path, kind="gradient", rank=0, steps=[2, 3], overrides=every)
    assert done.returncode == 2, done.stderr[-4000:]
    assert "2 steps in a row" in done.stderr
    assert "2, 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in lines(tmp_path / "bad_steps.jsonl")] == [2, 3]
    assert [path.name for path in tmp_path.glob("checkpoints/step_*")] == ["step_00000001"]
