"""The time that the job has left against the steps that are planned, and memory as `plan` estimates it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import torch

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.env import slurm_job
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.planning.estimate import Estimate, estimate
from megatron_v2pe.planning.request.workload import Assumptions, assumed_pack
from megatron_v2pe.preflight.findings import Finding
from megatron_v2pe.preflight.links import known_hardware

_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def seconds_left(text: str) -> float | None:
    """Seconds of what squeue calls time left: `1-02:03:04`, `02:03:04` or `03:04`; None for UNLIMITED and the like."""
    match = _LEFT.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def time_left(job: str) -> str:
    """What squeue says of a job, "" where it is missing, as in many containers."""
    path = shutil.which("squeue")
    if path is None:
        return ""
    command = [path, "-h", "-j", job, "-o", "%L"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()


def planned(
    config: RunConfig, arch: InternVLArchitecture, device: torch.device, world_size: int
) -> Estimate | None:
    """The plan of the run on this rank's GPU; None where nothing is stated for the device."""
    hardware = known_hardware(device)
    if hardware is None:
        return None
    memory_gib = torch.cuda.mem_get_info(device)[1] / 2**30
    pack = assumed_pack(config, arch, Assumptions())
    return estimate(
        config, arch, pack, gpus=world_size, hardware=dataclasses.replace(hardware, memory_gib=memory_gib)
    )


def check_memory(estimate_of_run: Estimate | None) -> Finding:
    """Whether the run fits its GPUs."""
    if estimate_of_run is None:
        text = "not planned: no stated numbers for this device"
        return Finding(name="memory", verdict="note", text=text)
    needed, has = estimate_of_run.fullest.total_bytes / 2**30, estimate_of_run.hardware.memory_gib
    text = f"plan: {needed:.1f} of {has:.1f} GiB on the fullest rank"
    if not estimate_of_run.fits:
        text += "; `megatron-v2pe plan` says what to change"
    return Finding(name="memory", verdict="go" if estimate_of_run.fits else "no-go", text=text)


def check_limit(config: RunConfig, step_seconds: float | None, *, left: str | None = None) -> Finding:
    """Steps that are still to do against the time left.

    Args:
        config: the run.
        step_seconds: of one step where the run folder has none; None if not known.
        left: what squeue said; None asks it.
    """
    job = slurm_job()
    if left is None:
        if job is None:
            return Finding(name="time limit", verdict="go", text="not inside a SLURM job: none")
        left = time_left(job)
    seconds = seconds_left(left)
    if seconds is None:
        answer = f"squeue says {left!r}" if left else "squeue does not answer here"
        return Finding(name="time limit", verdict="note", text=f"{answer}: not compared with the steps")
    done, measured = history(config)
    step_seconds = measured or step_seconds
    steps = max(0, config.optim.steps - done)
    if step_seconds is None:
        text = f"{seconds / 3600:.2f} h left for {steps} steps; how long one takes is not known yet"
        return Finding(name="time limit", verdict="note", text=text)
    return judge_time(steps, step_seconds, seconds)


def judge_time(steps: int, step_seconds: float, seconds: float) -> Finding:
    """Finding of the steps to do, the time of one, and the time left."""
    needed = steps * step_seconds
    text = f"{seconds / 3600:.2f} h left; {steps} steps of {step_seconds:.3g} s need {needed / 3600:.2f} h"
    if steps and step_seconds > seconds:
        return Finding(name="time limit", verdict="no-go", text=f"{text}: not one step fits")
    if needed > seconds:
        return Finding(name="time limit", verdict="note", text=f"{text}: the job will queue itself again")
    return Finding(name="time limit", verdict="go", text=text)


def history(config: RunConfig) -> tuple[int, float | None]:
    """Last step in the run folder, and the median seconds of its last steps with their wait for data."""
    path = Path(config.runtime.run_dir) / "metrics.jsonl"
    if not path.exists():
        return 0, None
    lines = [line for _, line in read_jsonl(path, skip_cut=True)]
    if not lines:
        return 0, None
    seconds = [float(line["step_s"]) + float(line["data_s"]) for line in lines[-20:]]
    return int(lines[-1]["step"]), statistics.median(seconds)
