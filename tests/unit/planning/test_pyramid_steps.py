"""What `plan` says of a tower with a pyramid, against ranks that are built and steps that really run."""

import json

import pytest
import torch

from megatron_v2pe.cli.main import main
from megatron_v2pe.config.arch.architecture import parse_architecture
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import (
    DataConfig,
    LoRAConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.inference.cache.memory import Stage
from megatron_v2pe.parallel.plan import ParallelPlan, resolve
from megatron_v2pe.planning.answering import plan_prefill
from megatron_v2pe.planning.estimate import activation_peak
from megatron_v2pe.planning.measured_step import MeasuredStep, peak_bytes
from megatron_v2pe.planning.planner_check import compare_rank
from megatron_v2pe.planning.request.hardware import H100
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.time.compute import model_chunk_flops
from megatron_v2pe.preflight import limit
from tests.unit.planning.test_against_steps import counted_flops, setting, sizes

PYRAMID = {
    "branches": [
        {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 256,
            "image_size": 192,
            "patch_size": 16,
        }
    ],
    "interactions": 2,
    "deform_num_heads": 4,
}
SMALL_TOWER = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
PUBLISHED_PYRAMID = {"branches": [{**SMALL_TOWER, "image_size": 896}], "interactions": 4}


def run(**sections):
    return RunConfig(runtime=RuntimeConfig(dtype="float32"), **sections)


LLAVA = {**PYRAMID, "readout": "llava", "readout_grid": 6}
RUNS = {
    "nothing recomputed": run(),
    "tower recomputed": run(vision=VisionConfig(recompute="full")),
    "tower's MLP recomputed": run(vision=VisionConfig(recompute="selective")),
    "tower in slices": run(vision=VisionConfig(micro_batch_tiles=4)),
    "tower frozen": run(vision=VisionConfig(freeze=True)),
    "large branch frozen": run(vision=VisionConfig(tower="piip", freeze_large_branch=True)),
    "large branch with adapters": run(vision=VisionConfig(tower="piip"), lora=LoRAConfig(vision_rank=4)),
}


FAST = ("nothing recomputed", "tower recomputed", "large branch frozen")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
TOWER = {"tokens": 768, "tiles": 16, "hidden": 64, "layers": 1, "vocab": 256, "vision_layers": 4}


@pytest.mark.parametrize("name", NAMES)
def test_activation_peaks_are_those_that_the_allocator_sees(name, one_rank):
    """Many tiles and a small decoder, so that the tower is the peak."""
    size = sizes(**TOWER, pyramid=PYRAMID)
    measured = peak_bytes(MeasuredStep(config=RUNS[name], sizes=size))
    phase = activation_peak(setting(RUNS[name], size))
    assert phase.total_bytes == pytest.approx(measured, rel=0.10)


LLAVA_RUNS = [
    "nothing recomputed",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("tower recomputed", "tower in slices", "large branch frozen")
    ),
]


@pytest.mark.parametrize("name", LLAVA_RUNS)
def test_the_readout_of_all_branches_is_planned(name, one_rank):
    """Peak as the allocator sees it, FLOPs as torch counts them: 36 tokens a tile, both ways of each interaction."""
    size = sizes(**TOWER, pyramid=LLAVA)
    measured = peak_bytes(MeasuredStep(config=RUNS[name], sizes=size))
    assert activation_peak(setting(RUNS[name], size)).total_bytes == pytest.approx(measured, rel=0.10)
    whole = ModelChunk(num_layers=size.layers, is_first=True, is_last=True)
    predicted = model_chunk_flops(setting(RUNS[name], size), whole).total
    passes = {"tower in slices": 4.0}.get(name, 3.0 + name.startswith("tower"))
    wanted = counted_flops(size, RUNS[name]) + uncounted(size, passes, into_smaller=2)
    if name == "large branch frozen":
        # What the first interaction reads of it needs no gradient: 64 patches of 128 channels, projected to 64.
        predicted -= 2.0 * size.tiles * 64 * 128 * 64
    assert wanted == pytest.approx(predicted, rel=1e-6)


def test_interactions_and_other_branches_are_a_large_part_of_the_peak(one_rank):
    """The comparison above would notice if either were left out."""
    whole = activation_peak(setting(run(), sizes(**TOWER, pyramid=PYRAMID)))
    plain = activation_peak(setting(run(), sizes(**TOWER)))
    assert whole.parts["vision tower"] > 1.5 * plain.parts["vision tower"]


def uncounted(size, passes, *, into_smaller=1):
    """Sampling (4 corners and the weight) and depthwise convolutions, which torch's counter leaves out."""
    large, small = (64, 128), (144, 64)  # patches, channels
    total = 0.0
    for rows, width, times in ((*large, 2), (*small, into_smaller)):
        total += times * rows * (5 * (width // 2) * 4 + 9 * (width // 4))
    return passes * 2.0 * size.tiles * total


@pytest.mark.parametrize("name", NAMES)
def test_executed_flops_are_those_that_torch_counts(name, one_rank):
    """Exact, but for products that a first interaction under a frozen branch saves, and for adapters (1 in 100)."""
    size, config = sizes(pyramid=PYRAMID), RUNS[name]
    whole = ModelChunk(num_layers=size.layers, is_first=True, is_last=True)
    predicted = model_chunk_flops(setting(config, size), whole).total
    passes = {"tower frozen": 1.0, "tower in slices": 4.0}.get(name, 3.0 + name.startswith("tower"))
    approximate = name in ("large branch frozen", "large branch with adapters")
    wanted = counted_flops(size, config) + uncounted(size, passes)
    assert wanted == pytest.approx(predicted, rel=2e-3 if approximate else 1e-6)


LAYOUTS = {
    "whole": (1, run()),
    "tp 2, split": (2, run(parallel=ParallelConfig(tp=2, vision="tensor"))),
    "tp 2, sequence parallel, large branch frozen": (
        4,
        run(
            parallel=ParallelConfig(tp=2, sequence_parallel=True),
            vision=VisionConfig(tower="piip", freeze_large_branch=True),
        ),
    ),
    "tp 2, split, readout of all branches": (
        2,
        run(parallel=ParallelConfig(tp=2, vision="tensor")),
    ),
    "adapters on the large branch": (
        2,
        run(vision=VisionConfig(tower="piip"), lora=LoRAConfig(vision_rank=8, language_rank=8)),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_parameter_and_byte_of_a_rank(name):
    gpus, config = LAYOUTS[name]
    readout = {"readout": "llava", "readout_grid": 32} if "readout" in name else {}
    arch = parse_architecture({**PUBLISHED["2B"], "piip_config": {**PUBLISHED_PYRAMID, **readout}})
    compared = compare_rank(config, arch, plan=resolve(config.parallel, gpus), rank=gpus - 1)
    assert compared.same_parameters
    assert compared.predicted == compared.built


def test_the_verb_plans_a_pyramid(tmp_path, capsys):
    """More time and memory than the plain folder; also for a prompt."""
    (tmp_path / "run.yaml").write_text(
        "data: {max_pack_tokens: 32768}\nmodel: {recompute: full}\noptim: {global_batch_size: 8}\n"
    )
    found = {}
    for name, extra in (("plain", {}), ("pyramid", {"piip_config": PUBLISHED_PYRAMID})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**PUBLISHED["2B"], **extra}))
        arguments = ["plan", str(tmp_path / "run.yaml"), "--gpus", "8", "--arch", str(path), "--json"]
        assert main(arguments) in (0, 1)
        training = json.loads(capsys.readouterr().out)
        assert main([*arguments, "--inference", "8192"]) in (0, 1)
        found[name] = training, json.loads(capsys.readouterr().out)
    plain, pyramid = (found[name] for name in ("plain", "pyramid"))
    for key in ("executed_flops", "model_flops", "step_seconds"):
        assert pyramid[0][key] > plain[0][key], key
    vision = [found[name][0]["stages"][0]["activations"]["vision tower"] for name in ("plain", "pyramid")]
    assert vision[1] > 1.2 * vision[0] > 0
    weights = [found[name][1]["stages"][0]["weights_bytes"] for name in ("plain", "pyramid")]
    assert weights[1] > weights[0]


def test_a_prefill_chunk_of_a_pyramid_is_planned():
    """What the engine checks before a prompt: the tower's moment, larger than without the pyramid."""
    found = []
    for extra in ({}, {"piip_config": PUBLISHED_PYRAMID}):
        arch = parse_architecture({**PUBLISHED["2B"], **extra})
        stage = Stage(
            config=run(),
            arch=arch,
            plan=ParallelPlan(),
            num_layers=arch.language.num_layers,
            is_first=True,
            is_last=True,
            on_cpu=True,
        )
        found.append(plan_prefill(stage)(512, 8))
    (part, plain), (same_part, pyramid) = found
    assert part == same_part == "vision tower"
    assert pyramid > 1.2 * plain


def test_preflight_plans_the_memory_of_a_pyramid(monkeypatch):
    """On a GPU with stated numbers the finding is a figure, larger than without the pyramid."""
    monkeypatch.setattr(limit, "known_hardware", lambda _device: H100)
    monkeypatch.setattr(limit.torch.cuda, "mem_get_info", lambda _device: (0, 80 * 2**30))
    config = RunConfig(data=DataConfig(max_pack_tokens=8192), optim=OptimConfig(global_batch_size=2))
    found = []
    for extra in ({}, {"piip_config": PUBLISHED_PYRAMID}):
        arch = parse_architecture({**PUBLISHED["2B"], **extra})
        estimated = limit.planned(config, arch, torch.device("cpu"), 2)
        assert limit.check_memory(estimated).text.startswith("plan: ")
        found.append(estimated.fullest.total_bytes)
    assert found[1] > found[0]
