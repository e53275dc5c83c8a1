"""The run folder: written, read, renamed and flushed by every node, seen by all, and large enough."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.files import sync_folder, writable_folder, write_atomic
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.memory.parameters import model_chunk_parameters
from megatron_v2pe.planning.memory.state import frozen_parts, is_trained_name
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.preflight.findings import Finding, worst_over_ranks
from megatron_v2pe.train.introduction import RunSizes

PROBE_BYTES = 32 * 2**20
SLOW_MB_S = 50.0
SEEN_SECONDS = 10.0  # network file systems remember for some seconds that a file was not there
_TOKEN = ".preflight-token"


def check_folder(run_dir: str) -> Finding:
    """Write, flush, rename, read back, delete; no collective."""
    folder = writable_folder(run_dir, field="runtime.run_dir")
    probe = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
    aside = probe.with_name(probe.name + ".tmp")
    content = os.urandom(2**20) * (PROBE_BYTES // 2**20)
    try:
        start = time.perf_counter()
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(probe)
        sync_folder(folder)
        mb_s = PROBE_BYTES / (time.perf_counter() - start) / 1e6
        is_same = probe.read_bytes() == content
    finally:
        aside.unlink(missing_ok=True)
        probe.unlink(missing_ok=True)
    if not is_same:
        text = f"{folder}: a file read back differs from what was written"
        return Finding(name="run folder", verdict="no-go", text=text)
    text = f"{folder}: {mb_s:.0f} MB/s written and flushed, renamed, read back"
    return Finding(name="run folder", verdict="go" if mb_s >= SLOW_MB_S else "note", text=text)


def check_shared(run_dir: str) -> Finding:
    """A file of rank 0 is seen by every rank. Collective."""
    token, content = Path(run_dir, _TOKEN), f"{os.getpid()} {time.time_ns()}"
    expected = [content]
    dist.broadcast_object_list(expected)
    if dist.get_rank() == 0:
        try:
            write_atomic(token, content)
        except OSError as error:
            expected = [f"cannot be written: {error}"]  # `run folder` says the same; the others find nothing
    dist.barrier()
    end = time.monotonic() + SEEN_SECONDS
    while not (seen := token.exists() and token.read_text() == expected[0]) and time.monotonic() < end:
        time.sleep(0.2)
    problem = (
        f"{run_dir}: a file that rank 0 wrote is not seen here; runtime.run_dir must be on a shared disk"
    )
    finding = Finding(
        name="shared disk",
        verdict="go" if seen else "no-go",
        text=f"all {dist.get_world_size()} ranks see the same run folder" if seen else problem,
    )
    joined = worst_over_ranks(finding)
    if dist.get_rank() == 0:
        token.unlink(missing_ok=True)
    return joined


def run_sizes(config: RunConfig, arch: InternVLArchitecture) -> RunSizes:
    """Parameters of the model, and bytes of a checkpoint's tensors.

    A checkpoint holds the stored weights, and of the trained ones the float32 copy and two moments.
    """
    whole = ModelChunk(num_layers=arch.language.num_layers, is_first=True, is_last=True)
    parameters = list(model_chunk_parameters(arch, ParallelPlan(), whole, config.lora))
    total = sum(size for _, size in parameters)
    trained = sum(size for name, size in parameters if is_trained_name(name, frozen_parts(config)))
    stored = trained if config.lora.is_on else total
    element_bytes = 2 if config.runtime.dtype == "bfloat16" else 4
    return RunSizes(parameters=total, trained=trained, checkpoint_bytes=stored * element_bytes + trained * 12)


def checkpoint_bytes(config: RunConfig, arch: InternVLArchitecture) -> int:
    """Bytes of a checkpoint's tensors; see `run_sizes`."""
    return run_sizes(config, arch).checkpoint_bytes


def check_space(config: RunConfig, arch: InternVLArchitecture, *, free_gb: float) -> Finding:
    """Room for the kept checkpoints, the one that is being written, and `free_gb` besides; no collective."""
    one, keep = checkpoint_bytes(config, arch), config.checkpoint.keep
    needed = one * (keep + 1) + free_gb * 1e9
    folder = Path(config.runtime.run_dir)
    free = shutil.disk_usage(folder).free
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/step_*/**/*") if path.is_file())
    missing = needed - free - held
    text = f"{free / 1e9:.1f} GB free; {keep} + 1 checkpoints of {one / 1e9:.3g} GB"
    text += f" and {free_gb:g} GB besides" if free_gb else ""
    if missing > 0:
        text += f": {missing / 1e9:.3g} GB too few; make room, lower checkpoint.keep, or move runtime.run_dir"
    return Finding(name="free space", verdict="no-go" if missing > 0 else "go", text=text)
