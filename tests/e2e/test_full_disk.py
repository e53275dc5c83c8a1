"""A checkpoint that does not fit leaves the one before it as it was; the run continues once there is room.

Strategy: the limit on file sizes of the process (`ulimit -f`), which fails a write in the middle as a quota does.
"""

import subprocess

from tests.support import tiny


def test_a_save_that_fails_keeps_the_old_checkpoint(tmp_path):
    checkpoint = tiny.import_golden(tmp_path / "checkpoint")
    meta = tiny.make_data(tmp_path / "data")
    run_dir = tmp_path / "run"
    config = tiny.run_yaml(tmp_path / "run.yaml", checkpoint=checkpoint, meta=meta, run_dir=run_dir)
    tiny.train(config, ["checkpoint.save_every=2", "optim.steps=3", "checkpoint.keep=1"])
    command = tiny.train_command(config, ["optim.steps=5"], ranks=1)
    limited = ["bash", "-c", 'ulimit -f 256; exec "$@"', "limited", *command]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr[-4000:]
    message = done.stderr.splitlines()[-1]
    assert "step_00000005" in message
    assert "GiB free" in message
    assert "Traceback" not in message
    assert (run_dir / "checkpoints" / "step_00000003" / "checkpoint.json").exists()
    stderr = tiny.train(config, ["optim.steps=5", "checkpoint.verify=full"])
    assert "resumed from" in stderr
    assert "at step 3" in stderr
    assert len(tiny.curve(run_dir)) == 5
