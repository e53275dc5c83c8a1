"""A save in the background stores what a save that training waits for stores, bit for bit, and changes no loss.

Strategy: the same run twice at each layout, once with saves in the background whose writing is slowed down until it
spans several steps; every file of every checkpoint and every loss are compared. Strictness: equal bytes.
"""

import logging
import os
import time

import pytest

from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.retention import complete_steps, step_path
from tests.support import tiny
from tests.support.spawn import run_ranks

pytestmark = pytest.mark.distributed

SAVED = [2, 4, 6]
COMMON = ["optim.steps=6", "checkpoint.save_every=2", "checkpoint.keep=9"]
LAYOUTS = {
    "dp 2": [],
    "tp 2 in bfloat16": ["parallel.tp=2", "parallel.sequence_parallel=true", "runtime.dtype=bfloat16"],
    "pp 2 with adapters": ["parallel.pp=2", "lora.language_rank=4", "lora.vision_rank=2"],
}
WRITE_SECONDS = 0.002  # on top of each of some hundred writes


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def slow_writes():
    write = os.pwrite

    def slowly(*args):
        time.sleep(WRITE_SECONDS)
        return write(*args)

    os.pwrite = slowly


def train_all(rank, world_size, config_path, runs, meeting):
    """Train each run to its last step; returns what each logged on this rank."""
    import torch.distributed as dist

    from megatron_v2pe.config.load import load_run_config
    from megatron_v2pe.preflight.disk import run_sizes
    from megatron_v2pe.train.loop import train
    from megatron_v2pe.train.setup import Outside

    dist.destroy_process_group()  # the spawner's; each run makes its own
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="nobody", MASTER_PORT="1")  # ranks meet in files
    slow_writes()
    logger = logging.getLogger("megatron_v2pe")
    logged = []
    logger.setLevel(logging.INFO)
    for number, overrides in enumerate(runs):
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}_{number}", rank=rank, world_size=world_size
        )
        lines = Lines()
        logger.addHandler(lines)
        assert train(load_run_config(config_path, overrides), Outside(sizes_of=run_sizes)) == ""
        logger.removeHandler(lines)
        logged.append(lines.lines)
    return logged


def index_of(lines, *parts):
    return next(i for i, line in enumerate(lines) if all(part in line for part in parts))


def check_background(lines):
    """The first checkpoint was finished after a later step, the last one before the end."""
    assert index_of(lines, "step 3/6") < index_of(lines, "saved", "step_00000002", "training paused")
    assert index_of(lines, "step 5/6") < index_of(lines, "saved", "step_00000004", "training paused")
    assert "paused" not in lines[index_of(lines, "saved", "step_00000006")]


def test_the_same_bytes_and_losses_as_of_saves_that_training_waits_for(tmp_path):
    config = tiny.prepared(tmp_path)
    runs = []
    for layout, overrides in LAYOUTS.items():
        for name in ("background", "waiting"):
            run_dir = tmp_path / layout.replace(" ", "_") / name
            flag = f"checkpoint.async_save={str(name == 'background').lower()}"
            runs.append([*COMMON, *overrides, flag, f"runtime.run_dir={run_dir}"])
    logged, _ = run_ranks(train_all, 2, str(config), runs, str(tmp_path / "meeting"), timeout=280)
    for layout, lines in zip(LAYOUTS, logged[::2], strict=True):
        background, waiting = (
            tmp_path / layout.replace(" ", "_") / name for name in ("background", "waiting")
        )
        check_background(lines)
        assert tiny.curve(background) == tiny.curve(waiting), layout
        assert complete_steps(background) == complete_steps(waiting) == SAVED
        for step in SAVED:
            one, other = (read_info(step_path(run, step), verify="full") for run in (background, waiting))
            assert one.files == other.files, (layout, step)
            assert any(name.endswith(".distcp") for name in one.files)
