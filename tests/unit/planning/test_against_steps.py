"""Predicted FLOPs and activation peaks against small training steps that really run, on one rank.

Lengths, more options and layouts of two ranks are compared by tools/check_plan.py (slow tier below).
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_v2pe.config.schema import (
    LoRAConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.parallel.plan import ParallelPlan
from megatron_v2pe.planning.estimate import activation_peak
from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes, peak_bytes
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.request.workload import Pack
from megatron_v2pe.planning.time.compute import model_chunk_flops

TOOLS = Path(__file__).parents[3] / "tools"
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def sizes(**changes):
    small = {"tokens": 768, "tiles": 6, "hidden": 128, "layers": 2, "vocab": 512, "vision_layers": 2}
    return StepSizes(**{**small, **changes})


def setting(config, size):
    pack = Pack(
        document_lengths=(size.tokens,),
        num_tiles=size.tiles,
        supervised_tokens=round(size.supervised * size.tokens),
        source="",
    )
    return Setting(
        config=config,
        arch=size.architecture(),
        plan=ParallelPlan(),
        pack=pack,
        backend="native",
        on_cpu=True,
    )


def run(**sections):
    return RunConfig(runtime=RuntimeConfig(dtype="float32"), **sections)


def attention_flop(q, k, v, dropout=0.0, is_causal=False, *rest, **_):
    """Two products of [s, t, d] for each head, half of them where attention is causal."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim // (2 if is_causal else 1)


def attention_backward_flop(grad, q, k, v, out, lse, dropout=0.0, is_causal=False, *rest, **_):
    """Scores again, and the gradients of scores, values, queries and keys: five products."""
    return attention_flop(q, k, v, dropout, is_causal) * 5 // 2


def added_in_place_flop(buffer, a, b, *rest, **_):
    """A product that is added to a gradient buffer (`models/layers/linears.py`): torch's counter does not know it."""
    return 2 * a[0] * a[1] * b[1]


class Everywhere:
    """In place of the counter's module tracker, which cannot follow modules that run again within backward."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def counted_flops(size, config):
    """Floating point operations of matrix products and attention in a step, the patch convolution left out."""
    step = MeasuredStep(config=config, sizes=size)
    mapping = {
        FLASH: attention_flop,
        FLASH_BACKWARD: attention_backward_flop,
        torch.ops.aten.addmm_: added_in_place_flop,
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = Everywhere()
    with counter:
        step()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if "convolution" not in str(operator))


STEPS = {
    "nothing recomputed": run(),
    "decoder recomputed": run(model=ModelConfig(recompute="full")),
    "decoder recomputed, MLP in chunks": run(model=ModelConfig(recompute="full", mlp_chunks=4)),
    "MLP recomputed": run(model=ModelConfig(recompute="selective")),
    "tower recomputed": run(vision=VisionConfig(recompute="full")),
    "tower's MLP recomputed": run(vision=VisionConfig(recompute="selective")),
    "tower in slices": run(vision=VisionConfig(micro_batch_tiles=2)),
    "tower frozen": run(vision=VisionConfig(freeze=True)),
    "language frozen": run(model=ModelConfig(freeze_language=True)),
}
ADAPTERS = {
    "adapters": run(lora=LoRAConfig(language_rank=4, vision_rank=4, projector_rank=4)),
    "adapters of the language, tower frozen": run(
        lora=LoRAConfig(language_rank=4), vision=VisionConfig(freeze=True)
    ),
    "adapters with dropout": run(lora=LoRAConfig(language_rank=4, dropout=0.1)),
    "adapters, decoder recomputed": run(
        lora=LoRAConfig(language_rank=4, vision_rank=4), model=ModelConfig(recompute="full")
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_executed_flops_are_those_that_torch_counts(name, one_rank):
    size, config = sizes(), STEPS[name]
    whole = ModelChunk(num_layers=size.layers, is_first=True, is_last=True)
    predicted = model_chunk_flops(setting(config, size), whole).total
    assert counted_flops(size, config) == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("name", [*(name for name in STEPS if "language" not in name), *ADAPTERS])
def test_activation_peaks_are_those_that_the_allocator_sees(name, one_rank):
    size, config = sizes(), {**STEPS, **ADAPTERS}[name]
    measured = peak_bytes(MeasuredStep(config=config, sizes=size))
    predicted = activation_peak(setting(config, size)).total_bytes
    assert predicted == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("tokens", [512, 2048])
def test_activation_peaks_at_other_lengths(tokens, one_rank):
    size = sizes(tokens=tokens, tiles=tokens // 128)
    measured = peak_bytes(MeasuredStep(config=run(), sizes=size))
    assert activation_peak(setting(run(), size)).total_bytes == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("vision", ["internvit_300m", "internvit_6b"])
def test_both_towers(vision, one_rank):
    """LayerNorm and a bias, or RMSNorm and norms of queries and keys; many tiles, so that the tower is the peak."""

    class Towers(StepSizes):
        def architecture(self):
            whole = super().architecture()
            if vision == "internvit_6b":
                return whole
            changes = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
            return dataclasses.replace(whole, vision=dataclasses.replace(whole.vision, **changes))

    size = Towers(tokens=1536, tiles=64, hidden=64, layers=1, vocab=256, vision_layers=3)
    config = run(model=ModelConfig(recompute="full"))
    measured = peak_bytes(MeasuredStep(config=config, sizes=size))
    phase = activation_peak(setting(config, size))
    assert phase.parts["vision tower"] > 0.7 * phase.total_bytes
    assert phase.total_bytes == pytest.approx(measured, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["state", "activations", "ranks"])
def test_the_whole_comparison_agrees(part):
    done = subprocess.run(
        [sys.executable, TOOLS / "check_plan.py", part],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
