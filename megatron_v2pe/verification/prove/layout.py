"""The layout that is proven on this machine: the run's own, made smaller axis by axis where it needs too many ranks.

    while tp x pp x cp needs more ranks than there are: the largest axis becomes half, and an odd one 2 (cp before pp
    before tp among equals); an axis above 1 never becomes 1
    dp is 2 where there are ranks for it, else 1; ep the largest size that its ranks can hold

Which way an axis works does not depend on its size beyond 2: a shard with a neighbor on one side and one with two are
both there from 2 on for a ring, from 3 on for a line of stages. What was made smaller is said.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.pipeline import expand_layout
from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ProvenLayout:
    """What runs.

    Attributes:
        parallel: sizes and ways of the axes.
        dp: data parallel ranks.
        num_layers: decoder layers of the narrow model, whole stages of them.
        notes: what differs from the run, for people.
    """

    parallel: ParallelConfig
    dp: int
    num_layers: int
    notes: tuple[str, ...]

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.parallel.replica_size * self.dp


def proven_layout(run: ParallelConfig, arch: InternVLArchitecture, *, max_ranks: int) -> ProvenLayout:
    """Make a run's layout fit this machine.

    Args:
        run: section `parallel` of the run.
        arch: of its model.
        max_ranks: processes that may be started.

    Raises:
        ConfigError: it cannot be made so small without losing an axis.
    """
    notes: list[str] = []
    sizes = {axis: getattr(run, axis) for axis in ("cp", "pp", "tp")}
    while math.prod(sizes.values()) > max_ranks:
        axis = max(sizes, key=lambda name: sizes[name])
        if sizes[axis] <= 2:
            names = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
            raise ConfigError(
                f"--ranks is {max_ranks}, but the run's axes at their smallest, {names}, need "
                f"{math.prod(sizes.values())}, and an axis that is left out is not proven; raise --ranks (processes of "
                "this machine, 0.6 GB each), or prove axes one after the other (parallel.pp=1, then parallel.cp=1)"
            )
        sizes[axis] = sizes[axis] // 2 if sizes[axis] % 2 == 0 else 2
    notes += [
        f"{axis} {size} for the run's {getattr(run, axis)}"
        for axis, size in sizes.items()
        if size != getattr(run, axis)
    ]
    dp = 2 if 2 * math.prod(sizes.values()) <= max_ranks else 1
    if dp == 1:
        sums = ", whose sums are those of cp" if sizes["cp"] > 1 else "; sums over replicas are not proven"
        notes.append(f"dp 1: no ranks are left for a second replica{sums}")
    ep, etp = _experts(run, arch, stage=sizes["tp"] * sizes["cp"] * dp, tp=sizes["tp"])
    if ep != run.ep:
        notes.append(f"ep {ep} for the run's {run.ep}")
    if etp != run.etp:
        notes.append(f"etp {etp} for the run's {run.etp}")
    pipeline, num_layers, pipeline_notes = _pipeline(run, pp=sizes["pp"])
    if run.overlap_grad_reduce and dp * sizes["cp"] == 1:
        notes.append("overlap_grad_reduce false: no ranks are left that reduce gradients")
        run = dataclasses.replace(run, overlap_grad_reduce=False, overlap_param_gather=False)
    parallel = dataclasses.replace(
        run, **sizes, ep=ep, etp=etp, pipeline_layout=pipeline, attention_backend="native"
    )
    return ProvenLayout(parallel=parallel, dp=dp, num_layers=num_layers, notes=(*notes, *pipeline_notes))


def _experts(run: ParallelConfig, arch: InternVLArchitecture, *, stage: int, tp: int) -> tuple[int, int]:
    """Expert sizes that the ranks of a stage can hold."""
    if arch.language.experts is None or run.ep == 1:
        return run.ep, min(run.etp, tp)
    etp = min(run.etp, tp)
    ranks = stage // max(1, etp)
    ep = max(size for size in range(1, min(run.ep, ranks) + 1) if ranks % size == 0 and run.ep % size == 0)
    if ep == 1:
        raise ConfigError(
            f"parallel.ep is {run.ep}, but the proof's {stage} ranks of a stage cannot spread experts over two; raise "
            "--ranks"
        )
    return ep, etp


def _pipeline(run: ParallelConfig, *, pp: int) -> tuple[str, int, list[str]]:
    """Stages of the narrow model as text, its decoder layers, notes."""
    num_stages = pp * run.vpp
    if not run.pipeline_layout:
        return "", num_stages if num_stages > 1 else 2, []
    if pp != run.pp:
        return (
            "",
            num_stages,
            [f"pipeline_layout even for the run's {run.pipeline_layout!r}, which is for pp {run.pp}"],
        )
    stages = [stage.replace("t", "") for stage in expand_layout(run.pipeline_layout)]
    counts = [stage.count("t") for stage in expand_layout(run.pipeline_layout)]
    few = [min(count, 2 if count > min(filter(None, counts)) else 1) for count in counts]
    narrow = "|".join(
        stage.replace("E", "E" + "t" * count) if "E" in stage else "t" * count + stage
        for stage, count in zip(stages, few, strict=True)
    )
    return narrow, sum(few), [f"pipeline_layout {narrow!r} for the run's {run.pipeline_layout!r}"]
