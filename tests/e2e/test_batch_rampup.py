"""A batch that grows: one curve on one rank, on two data parallel ranks, and through a resume under pipelining."""

import json
import shutil

import numpy as np
import pytest

from tests.support import tiny

RAMP_UP = [
    "optim.batch_rampup=[2,2,6]",
    "optim.global_batch_size=0",
    "optim.global_batch_tokens=3840",  # 6 packs of 640
    "checkpoint.save_every=3",
    "checkpoint.keep=9",
]
SIZES = [2, 2, 4, 6, 6]


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_the_same_curve_on_any_ranks_and_through_a_resume(tmp_path):
    checkpoint, meta = tiny.import_golden(tmp_path / "checkpoint"), tiny.make_data(tmp_path / "data")
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    config = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=one)
    tiny.train(config, RAMP_UP)
    tiny.train(config, [*RAMP_UP, f"runtime.run_dir={two}"], ranks=2)
    assert [line["packs"] for line in lines(one)] == [line["packs"] for line in lines(two)] == SIZES
    wanted = tiny.curve(one)
    np.testing.assert_allclose(tiny.curve(two), wanted, rtol=1e-5)
    digests = [line["data_digest"] for line in lines(one)]
    assert [line["data_digest"] for line in lines(two)] == digests

    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(two / "checkpoints" / "step_00000003", resumed / "checkpoints" / "step_00000003")
    log = tiny.train(config, [*RAMP_UP, f"runtime.run_dir={resumed}", "parallel.pp=2"], ranks=2)
    assert "at step 3" in log
    later = lines(resumed)
    assert [line["step"] for line in later] == [4, 5]
    assert [line["data_digest"] for line in later] == digests[3:]
    np.testing.assert_allclose([line["loss"] for line in later], [loss for loss, _ in wanted[3:]], rtol=1e-5)
