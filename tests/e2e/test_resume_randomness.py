"""A resumed run is bit-equal with every source of randomness on: drop path, adapter dropout, random strides."""

import shutil

import pytest

from tests.support import tiny

STEPS = ["checkpoint.save_every=2", "checkpoint.keep=9", "optim.steps=4", "optim.warmup_steps=1"]
DROP_PATH = ["vision.drop_path_rate=0.4"]
DROPOUT = ["lora.language_rank=4", "lora.vision_rank=4", "lora.projector_rank=4", "lora.dropout=0.3"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(DROP_PATH, id="drop path", marks=pytest.mark.slow),
        pytest.param(DROPOUT, id="adapter dropout", marks=pytest.mark.slow),
        pytest.param([*DROP_PATH, *DROPOUT, "data.num_workers=1"], id="all, with a loader process"),
    ],
)
def test_the_second_half_again(tmp_path, options):
    config = tiny.prepared(tmp_path)
    tiny.train(config, [*options, *STEPS])
    whole = tiny.curve(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    (checkpoints / "latest").write_text("step_00000002")
    tiny.train(config, [*options, *STEPS])
    assert tiny.curve(tmp_path / "run") == whole


def test_the_sources_change_something(tmp_path):
    config = tiny.prepared(tmp_path)
    tiny.train(config, [*STEPS, f"runtime.run_dir={tmp_path / 'plain'}"])
    tiny.train(config, [*STEPS, *DROP_PATH, f"runtime.run_dir={tmp_path / 'dropped'}"])
    assert tiny.curve(tmp_path / "plain") != tiny.curve(tmp_path / "dropped")
