"""`plan --inference` against what torch's allocator gives out while a prefill chunk is computed."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_v2pe.config.schema import RunConfig, RuntimeConfig
from megatron_v2pe.planning.measured_step import StepSizes, peak_bytes
from megatron_v2pe.planning.memory import inference
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.hardware import GPUS
from megatron_v2pe.planning.request.stages import ModelChunk
from megatron_v2pe.planning.request.workload import Pack

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from bench_support.answering import last_chunk, make_engine, make_prompt, run_chunk


@pytest.mark.parametrize(
    ("sizes", "tokens", "chunk"),
    [
        (StepSizes(hidden=256, layers=2), 8192, 1024),
        (StepSizes(hidden=256, layers=2), 32768, 1024),
        (StepSizes(hidden=512, layers=1, heads=8), 8192, 512),
    ],
    ids=["8K", "32K", "wide"],
)
def test_cache_to_the_row_and_a_chunk_within_ten_percent(sizes, tokens, chunk):
    torch.set_num_threads(1)
    engine = make_engine(sizes, chunk_tokens=chunk)
    prompt = make_prompt(sizes, tokens)
    cache, last = last_chunk(engine, prompt)
    peak = peak_bytes(partial(run_chunk, engine, prompt, cache, last))
    tiles = prompt.layout.total_tiles
    setting = Setting(
        config=RunConfig(runtime=RuntimeConfig(dtype="float32")),
        arch=sizes.architecture(),
        plan=engine.plan,
        pack=Pack(document_lengths=(tokens,), num_tiles=tiles, supervised_tokens=0, source="a prompt"),
        backend="native",
        on_cpu=True,
    )
    stage = ModelChunk(num_layers=sizes.layers, is_first=True, is_last=True)
    planned = inference.inference_memory(setting, (stage,), GPUS["h100"], chunk_tokens=chunk)
    one_row = planned.kv_cache_bytes / tokens
    assert cache.num_bytes == planned.kv_cache_bytes + one_row  # of the answer's first token
    assert 0.95 < planned.prefill_bytes / peak < 1.10, (planned.prefill_bytes, peak)
