"""An engine of a small InternVL2 with random weights, and prompts for it; for bench_inference.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.batch.pixel_norm import PixelNorm
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.inference.cache.kv_cache import KVCache
from megatron_v2pe.inference.chunks import PrefillChunk, plan_chunks
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.tiles import ArrayTiles
from megatron_v2pe.inference.runner import ModelRunner
from megatron_v2pe.parallel.topology import init_distributed, resolve
from megatron_v2pe.planning.measured_step import TILE_PIXELS
from megatron_v2pe.planning.measured_step import StepSizes as Sizes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_engine(
    sizes: Sizes, *, cp: int = 1, dtype: str = "float32", chunk_tokens: int, keep_tokens: int = 0
) -> Engine:
    """This rank's engine. Collective."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    config = RunConfig(parallel=ParallelConfig(cp=cp), runtime=RuntimeConfig(dtype=dtype))  # type: ignore[arg-type]
    plan = resolve(config.parallel, world_size)
    context = init_distributed(plan, seed=0)
    arch = sizes.architecture()
    (model,) = build_model(config, arch, context)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    norm = PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    runner = ModelRunner(model, arch, context=context, dtype=DTYPES[dtype], norm=norm)
    return Engine(runner, chunk_tokens=chunk_tokens, keep_tokens=keep_tokens)


def make_prompt(sizes: Sizes, tokens: int, *, tokens_per_image: int = 2048) -> Prompt:
    """An image of two tiles in every 2K tokens, in random text."""
    images = max(1, tokens // tokens_per_image)
    layout = dataclasses.replace(sizes, tokens=tokens, tiles=images).layout(pad_to_multiple=1).documents[0]
    generator = np.random.default_rng(0)
    ids = generator.integers(0, sizes.vocab, tokens)
    pixels = generator.integers(0, 256, (images, 3, TILE_PIXELS, TILE_PIXELS), dtype=np.uint8)
    return Prompt(tokens=ids, layout=layout, tiles=ArrayTiles(pixels, [1] * images))


def last_chunk(engine: Engine, prompt: Prompt) -> tuple[KVCache, PrefillChunk]:
    """A cache in which all of a prompt but its last chunk is random rows, and that chunk."""
    sizes = dict(cp=engine.plan.cp, tile_ranks=engine.runner.tile_ranks.size)
    chunks = plan_chunks(prompt.layout, chunk_tokens=engine.chunk_tokens, **sizes)
    cache = KVCache(engine.runner.place(engine.kv))
    cache.reserve(chunks, 1)
    language = engine.arch.language
    for chunk in chunks[:-1]:
        step = cache.note_chunk(chunk)
        for layer in range(1, language.num_layers + 1):
            rows = torch.randn(step.kept, language.num_kv_heads, language.head_dim, dtype=engine.runner.dtype)
            cache.append(layer, rows, rows)
    return cache, chunks[-1]


def run_chunk(engine: Engine, prompt: Prompt, cache: KVCache, chunk: PrefillChunk) -> None:
    """One prefill chunk."""
    how: dict[str, Any] = {"rope_length": prompt.layout.next_position, "is_first": True}
    wanted = np.array([prompt.layout.num_tokens - 1])
    engine.runner.run([lambda: engine.runner.chunk_work(prompt, chunk, cache, wanted=wanted, **how)])
