"""What `megatron-v2pe plan` does, between its arguments and its text.

arguments --inputs--> config, architecture, pack, hardware --estimate / search / inference--> text or json
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.parallel.plan import resolve
from megatron_v2pe.planning.as_json import estimate_data, inference_data, search_data, variant_data
from megatron_v2pe.planning.changes import Evaluate, advise, relax, train_less
from megatron_v2pe.planning.estimate import Estimate, backend_of, estimate
from megatron_v2pe.planning.memory.inference import inference_memory
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.report import (
    estimate_text,
    fp8_lines,
    heading_lines,
    inference_lines,
    less_lines,
    search_lines,
)
from megatron_v2pe.planning.request.hardware import Hardware
from megatron_v2pe.planning.request.inputs import (
    PlanRequest,
    check_run,
    chosen_hardware,
    find_architecture,
    hf_folder,
)
from megatron_v2pe.planning.request.stages import model_chunks_of_rank
from megatron_v2pe.planning.request.workload import Pack, assumed_pack, fullest_pack, mean_pack
from megatron_v2pe.planning.search import in_fp8, search


def packs_of(request: PlanRequest, arch: InternVLArchitecture) -> tuple[Pack, Pack]:
    """The pack that memory has to hold, and the one that time is worked out for."""
    if not request.measure_data:
        pack = assumed_pack(request.config, arch, request.assumptions)
        return pack, pack
    from megatron_v2pe.planning.request.measured_packs import measured_packs  # torch, tokenizer, images

    packs = measured_packs(request.config, arch, hf_folder(request.config))
    return fullest_pack(packs), mean_pack(packs)


def evaluate(
    config: RunConfig, *, arch: InternVLArchitecture, packs: tuple[Pack, Pack], gpus: int, hardware: Hardware
) -> Estimate:
    """Check and estimate a run: memory of the fullest pack, everything else of the mean one."""
    check_run(config, arch, gpus)
    full = estimate(config, arch, packs[0], gpus=gpus, hardware=hardware)
    if packs[0] == packs[1]:
        return full
    mean = estimate(config, arch, packs[1], gpus=gpus, hardware=hardware)
    return replace(mean, ranks=full.ranks)


def run_plan(request: PlanRequest) -> tuple[str, bool]:
    """The report, and whether the run (or any layout of a search) fits.

    Raises:
        ConfigError, CheckpointError, DataError: mistakes in the request, the configuration or the data.
    """
    name, arch = find_architecture(request.arch, request.config)
    hardware = chosen_hardware(request)
    if request.inference:
        return _inference(request, name, arch, hardware)
    ask = partial(evaluate, arch=arch, packs=packs_of(request, arch), gpus=request.gpus, hardware=hardware)
    if request.search:
        return _search(request, name, arch, hardware, ask)
    result = ask(request.config)
    change = (relax if result.fits else advise)(request.config, ask)
    less = () if result.fits or change else train_less(request.config, ask)
    if request.as_json:
        data = {**estimate_data(result, name), "advice": variant_data(change)}
        return _json({**data, "train_less": [variant_data(variant) for variant in less]}), result.fits
    text = estimate_text(result, name, change)
    return text + "".join(f"{line}\n" for line in less_lines(less, request.config)), result.fits


def _search(
    request: PlanRequest, name: str, arch: InternVLArchitecture, hardware: Hardware, ask: Evaluate
) -> tuple[str, bool]:
    """The best layouts, and what FP8 would bring to the first."""
    config = request.config
    found = search(config, arch, ask, gpus=request.gpus, hardware=hardware)
    best = found[0]
    fits = best.estimate.fits
    fp8 = in_fp8(config, best, ask) if fits else None
    if request.as_json:
        data = search_data(found, config, count=request.search)
        return _json({"model": name, "search": data, "fp8": variant_data(fp8)}), fits
    heading = heading_lines(best.estimate, name)
    batch = f"  step     {batch_schedule(config).text}"
    rows = search_lines(found, config, count=request.search)
    less = () if fits else train_less(config, ask)
    lines = [heading[0], heading[3], batch, "", *rows, *fp8_lines(fp8, best), *less_lines(less, config)]
    return "\n".join(lines) + "\n", fits


def _inference(
    request: PlanRequest, name: str, arch: InternVLArchitecture, hardware: Hardware
) -> tuple[str, bool]:
    """Memory of answering one prompt with the run's layout."""
    data = replace(
        request.config.data,
        max_pack_tokens=request.inference,
        max_sample_tokens=request.inference,
        max_pack_tiles=max(request.config.data.max_pack_tiles, request.inference // arch.tokens_per_tile),
    )
    config = replace(request.config, data=data)
    check_run(config, arch, request.gpus)
    pack = replace(assumed_pack(config, arch, request.assumptions), source="a prompt")
    setting = Setting(
        config=config,
        arch=arch,
        plan=resolve(config.parallel, request.gpus),
        pack=pack,
        backend=backend_of(config, arch),
    )
    layers = arch.language.num_layers
    stages = [
        model_chunks_of_rank(config.parallel, layers, setting.plan, rank) for rank in range(setting.plan.pp)
    ]
    memories = [
        inference_memory(setting, stage, hardware, chunk_tokens=request.chunk_tokens, kv=request.kv)
        for stage in stages
    ]
    fits = max(memory.total_bytes for memory in memories) <= hardware.memory_gib * 2**30
    if request.as_json:
        return _json({"model": name, "fits": fits, "stages": inference_data(memories)}), fits
    plan = setting.plan
    title = f"{name} on {plan.world_size} x {hardware.name}: tp {plan.tp}, pp {plan.pp}, cp {plan.cp}, dp {plan.dp}"
    return "\n".join([title, "", *inference_lines(setting, memories, hardware)]) + "\n", fits


def _json(values: dict[str, object]) -> str:
    return json.dumps(values, indent=2) + "\n"
