"""From a run's file to its certificate.

run.yaml --proven_layout--> layout, --read_shapes--> packs, --narrow_*--> model and settings
one rank, then the ranks of the layout, true and with each mutation --worst of all ranks--> Certificate
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.load import dump_run_config
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_required, validate
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.parallel.shards import Sharding, sharding_of
from megatron_v2pe.train.guards.startup_checks import model_folder
from megatron_v2pe.v2pe.layout import pack_layout
from megatron_v2pe.verification.prove.certificate import (
    Certificate,
    clearest,
    left_out,
    machine_facts,
    tolerances,
    worst,
)
from megatron_v2pe.verification.prove.layout import ProvenLayout, proven_layout
from megatron_v2pe.verification.prove.mutations import MUTATIONS, ProofFacts
from megatron_v2pe.verification.prove.narrow import check_provable, narrow_architecture, narrow_config
from megatron_v2pe.verification.prove.ranks import CONFIG, PACKS, REFERENCE, Task, run_alone, run_layout
from megatron_v2pe.verification.prove.shapes import ProofData, read_shapes, to_arrays
from megatron_v2pe.verification.prove.slices import not_compared

logger = logging.getLogger(__name__)
PACKS_OF_A_REPLICA = 2
LEAST_RANKS = 2


@dataclass(frozen=True, kw_only=True)
class ProofRequest:
    """What a proof is asked for.

    Attributes:
        config: the run.
        max_ranks: processes that may be started.
        max_tokens: of a narrow pack.
        name: of the run's file, for the page.
    """

    config: RunConfig
    max_ranks: int = 8
    max_tokens: int = 512
    name: str = ""

    def __post_init__(self) -> None:
        if self.max_ranks < LEAST_RANKS:
            raise ConfigError(f"--ranks is {self.max_ranks}, but a layout has at least {LEAST_RANKS}")
        if self.max_tokens < 64:
            raise ConfigError(f"--tokens is {self.max_tokens}, but a pack of the proof needs at least 64")


def prove(request: ProofRequest) -> Certificate:
    """Prove a run's layout on this machine.

    Raises:
        ConfigError: a mistake in the run's file, or something that cannot be proven, by name.
        CheckpointError, DataError: the run's model or data cannot be used.
        RuntimeError: a process ended with an error.
    """
    started = time.monotonic()
    config = request.config
    check_required(config)
    hf_folder = model_folder(config)
    arch = read_architecture(hf_folder)
    _check_run(config, arch)
    layout = proven_layout(config.parallel, arch, max_ranks=request.max_ranks)
    num_packs = PACKS_OF_A_REPLICA * layout.dp * (layout.parallel.pp if layout.parallel.vpp > 1 else 1)
    data = read_shapes(config, arch, hf_folder, num_packs=num_packs, max_tokens=request.max_tokens)
    narrow, notes = narrow_config(config, layout, num_packs=num_packs)
    model = narrow_architecture(arch, layout, tile_side=data.tile_side)
    validate(narrow, model, layout.world_size)
    mutations = applied_mutations(narrow, layout, data, sharding_of(narrow.parallel, model))
    logger.info(
        "%d ranks (tp %d, pp %d, cp %d, dp %d) against one: %s; %d mutations",
        *(layout.world_size, layout.parallel.tp, layout.parallel.pp, layout.parallel.cp, layout.dp),
        *(data.summary, len(mutations)),
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / CONFIG).write_text(dump_run_config(narrow), encoding="utf-8")
        np.savez(folder / PACKS, **to_arrays(data.packs))  # type: ignore[arg-type]
        task = Task(
            hf_folder=str(hf_folder), layout=layout, tile_side=data.tile_side, mutations=tuple(mutations)
        )
        task.write(folder)
        run_alone(folder)
        found = run_layout(folder, layout.world_size)
        keys = _keys(folder)
    limits = tolerances(max(sum(each.layout.num_tokens for each in pack) for pack in data.packs))
    return Certificate(
        facts=_facts(request, config, arch, data),
        run=config.parallel,
        layout=layout,
        notes=[*layout.notes, *data.notes, *notes],
        errors={dtype: worst([rank["errors"][dtype] for rank in found]) for dtype in ("float64", "float32")},
        limits=limits,
        not_compared=not_compared([rank["held"] for rank in found], keys),
        caught=[
            clearest(name, worst([rank["mutations"][name] for rank in found]), limits["float32"])
            for name in mutations
        ],
        left_out=left_out(mutations),
        seconds=time.monotonic() - started,
    )


def _check_run(config: RunConfig, arch: InternVLArchitecture) -> None:
    """The run is one that could train, on the smallest world of its axes, and one that can be proven."""
    parallel = config.parallel
    world = parallel.pp * math.lcm(parallel.tp * parallel.cp, parallel.ep * parallel.expert_tp)
    # Batch and traced ranks are those of a launch, which is not here.
    runtime = dataclasses.replace(config.runtime, profile_ranks="0")
    optim = dataclasses.replace(config.optim, global_batch_size=world, global_batch_tokens=0, batch_rampup=())
    validate(dataclasses.replace(config, runtime=runtime, optim=optim), arch, world)
    check_provable(config, arch)


def _keys(folder: Path) -> list[str]:
    """Names of all parameters of the single rank."""
    wanted = torch.load(folder / REFERENCE, weights_only=True)
    return list(wanted["float32"]["gradients"])


def _facts(
    request: ProofRequest, config: RunConfig, arch: InternVLArchitecture, data: ProofData
) -> dict[str, str]:
    language, vision = arch.language, arch.vision
    experts = f", {language.experts.num_experts} experts" if language.experts else ""
    text = dump_run_config(config)
    return {
        "run": f"{request.name}, sha256 of its resolved settings {hashlib.sha256(text.encode()).hexdigest()[:16]}",
        "model": f"{language.architecture}, {language.num_heads} heads, {language.num_kv_heads} KV heads{experts}; "
        f"tower {vision.norm_type}, {vision.num_heads} heads; {arch.tokens_per_tile} visual tokens per tile",
        "data": f"{data.summary}; plan {data.fingerprint}, sha256 of the shapes {data.digest[:16]}",
        **machine_facts(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def applied_mutations(
    config: RunConfig, layout: ProvenLayout, data: ProofData, sharding: Sharding
) -> list[str]:
    """Names of the mutations that this layout can have."""
    plan = resolve(layout.parallel, layout.world_size)
    layouts = [
        pack_layout([each.layout for each in pack], pad_to_multiple=plan.pad_to_multiple)
        for pack in data.packs
    ]
    facts = ProofFacts(plan=plan, config=config, sharding=sharding, layouts=layouts)
    return [name for name, mutation in MUTATIONS.items() if mutation.applies(facts)]
