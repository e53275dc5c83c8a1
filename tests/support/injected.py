"""`train` with a fault put into one rank at chosen steps, python -m tests.support.injected KIND RANK STEPS ...

loss      weights of a pack become NaN before the step, so the loss of all ranks does
spike     the rank's sum of losses is a hundred times larger than it is; gradients are as they were
gradient  one element of a reduced gradient becomes Inf between backward and update; the loss stays finite
slow      the rank sleeps before it computes
hang      the rank falls asleep between forward and update, at the first start of the ranks only
"""

import os
import sys
import time
from dataclasses import replace

import numpy as np

import megatron_v2pe.train.loop as loop
import megatron_v2pe.train.step as step_module
from megatron_v2pe.cli.main import main
from megatron_v2pe.core.env import launcher

NAP_SECONDS = 1.5


def inject(kind: str, rank: int, steps: set[int]) -> None:
    """Wrap the loop's step; the fault is this rank's alone."""
    apply, schedule = loop.train_step, step_module.run_schedule
    count = 0

    def train_step(trainer, runner, batches, *, ranks, **kwargs):
        nonlocal count
        count += 1
        if kind == "loss" and ranks.rank == rank and count in steps:
            weights = np.full_like(batches[0].loss_weights, np.nan)
            batches = [replace(batches[0], loss_weights=weights), *batches[1:]]
        if kind == "slow" and ranks.rank == rank and count in steps:
            time.sleep(NAP_SECONDS)
        return apply(trainer, runner, batches, ranks=ranks, **kwargs)

    def run_schedule(wrapped, *args, **kwargs):
        outputs = schedule(wrapped, *args, **kwargs)
        if kind == "gradient" and launcher().rank == rank and count in steps:
            for parameter in wrapped[0].module.language.parameters():
                parameter.main_grad.fill_(float("inf"))  # this rank's shard is somewhere in them
        if kind == "spike" and launcher().rank == rank and count in steps:
            for output in outputs:
                output["loss_sum"] = output["loss_sum"] * 100
        is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if kind == "hang" and launcher().rank == rank and count in steps and is_first_start:
            fall_asleep()
        return outputs

    loop.train_step, step_module.run_schedule = train_step, run_schedule


def fall_asleep():
    time.sleep(1000)


def run(arguments: list[str]) -> int:
    """KIND RANK STEPS, then the arguments of `train`."""
    fault, where, when, *others = arguments
    inject(fault, int(where), {int(step) for step in when.split(",")})
    return main(["train", *others])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
