"""All checks in order, on all ranks; rank 0 has the table.

local checks (nothing waits) -> joined over ranks -> collective checks, only while nothing is wrong that would hang them
"""

from __future__ import annotations

import dataclasses
import logging
import time

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_required, validate
from megatron_v2pe.core.env import launcher
from megatron_v2pe.parallel.topology import ParallelContext, init_distributed, resolve, shutdown
from megatron_v2pe.preflight import disk, inputs, limit, links, machine, parity
from megatron_v2pe.preflight.findings import Finding, findings_table, guarded, worst_over_ranks, worst_verdict

logger = logging.getLogger(__name__)
TIMEOUT_MINUTES = 2


def preflight(config: RunConfig, *, free_gb: float = 0.0) -> tuple[str, bool]:
    """Check everything that a run needs.

    Args:
        config: the run. On one rank without a launcher its layout is replaced by that of one rank, with a note.
        free_gb: space, in 10^9 bytes, that must stay free besides the checkpoints.

    Returns:
        The table and whether to go; the same on all ranks. Collective under a launcher.

    Raises:
        ConfigError, CheckpointError: a mistake in the configuration or no such model.
    """
    start = time.monotonic()
    check_required(config)
    arch = inputs.read_model(config)
    config, layout = _layout(config)
    world_size = launcher().world_size
    validate(config, arch, world_size)
    machine.check_gpu_count()
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=config.runtime.seed, timeout_minutes=TIMEOUT_MINUTES)
    findings = [layout, *_find(config, arch, context, free_gb=free_gb)]
    shutdown()
    seconds = time.monotonic() - start
    table = findings_table(findings, ranks=world_size, seconds=seconds)
    return table, worst_verdict(findings) != "no-go"


def _layout(config: RunConfig) -> tuple[RunConfig, Finding]:
    """The layout that can be checked with the ranks there are."""
    parallel = config.parallel
    text = f"tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp} on {launcher().world_size} ranks"
    if launcher().master is not None or parallel.replica_size == 1:
        return config, Finding(name="layout", verdict="go", text=text)
    alone = dataclasses.replace(
        parallel,
        tp=1,
        pp=1,
        cp=1,
        cp_sharding="zigzag",
        vpp=1,
        sequence_parallel=False,
        vision="replicated",
        pipeline_layout="",
    )
    text += ": checked as one rank; start under torchrun, or with launch/submit.py, to check all"
    runtime = dataclasses.replace(config.runtime, profile_ranks="0")  # others of the run's are not here
    config = dataclasses.replace(config, parallel=alone, runtime=runtime)
    return config, Finding(name="layout", verdict="note", text=text)


def _find(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext, *, free_gb: float
) -> list[Finding]:
    run_dir, device, world_size = config.runtime.run_dir, context.ranks.device, context.plan.world_size
    estimate = limit.planned(config, arch, device, world_size)
    step_seconds = None if estimate is None else estimate.time.seconds
    local = [
        guarded("device", lambda: machine.check_device(device)),
        guarded("memory", lambda: limit.check_memory(estimate)),
        guarded("run folder", lambda: disk.check_folder(run_dir)),
        guarded("free space", lambda: disk.check_space(config, arch, free_gb=free_gb)),
        guarded("data", lambda: inputs.check_data(config)),
        guarded("time limit", lambda: limit.check_limit(config, step_seconds)),
    ]
    findings = [worst_over_ranks(each) for each in local]
    findings += [machine.check_versions(), machine.check_clocks(device), *links.check_links(device)]
    if world_size > 1:
        findings.append(disk.check_shared(run_dir))
    findings.append(worst_over_ranks(parity.check_attention(config, arch, context)))
    return findings
