"""Speed and memory of answering: prefill in chunks, decode over a cache, further questions.

    python tools/bench_inference.py prefill     chunked prefill against one forward pass of training without gradients
    python tools/bench_inference.py ranks       prefill of cp 2, per rank, against cp 1
    python tools/bench_inference.py attention   decode attention against a plain read of the same keys and values
    python tools/bench_inference.py tokens      time of a new token by length of the document
    python tools/bench_inference.py memory      peak of a chunk by length, and bytes of the cache
    python tools/bench_inference.py further     a second question about a document against the first
    python tools/bench_inference.py             all of them, ten minutes on two cores

How to read it. Times are processor seconds of one thread, the least of several; ratios of one run carry over to other
sizes. `peak` is the most that torch's allocator gave out at a time beyond weights and cache (bench_support.step). Each
target is a line that begins with `pass` or `FAIL`. Models are small, with random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from bench_support.answering import last_chunk, make_engine, make_prompt, run_chunk
from bench_support.step import best_seconds, machine, on_ranks

from megatron_v2pe.assembly.schedule import run_schedule
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.inference.cache.memory import kv_shape
from megatron_v2pe.inference.engine import Engine
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.sampling import Sampling
from megatron_v2pe.parallel.attention.rows import attend_rows
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.feature_router import FeatureRouter
from megatron_v2pe.planning.measured_step import StepSizes as Sizes
from megatron_v2pe.planning.measured_step import peak_bytes
from megatron_v2pe.v2pe.layout import pack_layout

MIB = 2**20
SMALL = Sizes(hidden=64, layers=2, heads=4, kv_heads=2, vocab=600, vision_hidden=64, vision_layers=2)
ONE_TOKEN = Sampling(max_new_tokens=1)


def judged(is_met: bool, text: str) -> bool:
    """Print a target's line."""
    print(f"{'pass' if is_met else 'FAIL'}  {text}", flush=True)
    return is_met


def training_forward(engine: Engine, prompt: Prompt) -> None:
    """One forward pass over the whole prompt as training makes it, without gradients and head."""
    runner = engine.runner
    layout = pack_layout([prompt.layout])
    count = layout.num_tiles
    batch = PackedBatch(
        tokens=prompt.tokens,
        labels=np.full(layout.num_tokens, IGNORE_INDEX, dtype=np.int64),
        loss_weights=np.zeros(layout.num_tokens, dtype=np.float32),
        layout=layout,
        num_tiles=count,
        tile_range=(0, count),
        tiles=prompt.tiles.load(0, count),
        sample_ids=("benchmark",),
    )
    local = BatchSharder(context=engine.context, dtype=runner.dtype, norm=runner.norm).shard(batch)
    local = dataclasses.replace(local, labels=None, loss_weights=None)
    router, runner.model.route_features = runner.model.route_features, FeatureRouter(engine.ranks.tile_group)
    with torch.no_grad():
        run_schedule([runner.model], lambda it, model: (model(next(it)), None), [local], forward_only=True)
    runner.model.route_features = router


def prefill(options: argparse.Namespace) -> bool:
    """Chunks of several sizes against one pass."""
    sizes = Sizes(hidden=256, layers=4)
    engine, met = make_engine(sizes, chunk_tokens=1024), True
    for tokens in (8192, 16384):
        prompt = make_prompt(sizes, tokens)
        whole = best_seconds(partial(training_forward, engine, prompt), options.repeats)
        print(f"prefill of {tokens} tokens: one forward pass of training {whole:.2f} s")
        for chunk in (256, 512, 1024, 2048, 4096, tokens):
            engine.chunk_tokens = chunk
            seconds = best_seconds(partial(engine.begin, prompt, sampling=ONE_TOKEN), options.repeats)
            ratio = seconds / whole
            text = f"chunks of {chunk}: {seconds:.2f} s, {ratio:.2f}x"
            if chunk >= 1024:
                met &= judged(ratio <= 1.10, f"{text}, target 1.10x")
            else:
                print(f"      {text}", flush=True)
    return met


def rank_prefill(tokens: int, chunk: int, cp: int, repeats: int) -> float:
    """Processor seconds of this rank."""
    engine = make_engine(SMALL, cp=cp, chunk_tokens=chunk)
    prompt = make_prompt(SMALL, tokens)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        engine.begin(prompt, sampling=ONE_TOKEN)
        times.append(time.process_time() - start)
    return min(times)


def ranks(options: argparse.Namespace) -> bool:
    """Prefill on two ranks."""
    found = {cp: max(on_ranks(rank_prefill, cp, options.tokens, 4096, cp, 1)) for cp in (1, 2)}
    ratio = found[2] / found[1]
    text = f"{options.tokens} tokens: cp 1 {found[1]:.1f} s, cp 2 {found[2]:.1f} s per rank, {ratio:.3f}x, target 0.55x"
    return judged(ratio <= 0.55, text)


def attention(options: argparse.Namespace) -> bool:
    """Attention of one token to 16,384 keys: 8 key heads of 128 channels."""
    met = True
    for dtype, target in ((torch.float32, 3.0), (torch.bfloat16, 4.0)):
        keys, values = (torch.randn(8, 16384, 128).to(dtype) for _ in range(2))
        for heads in (16, 32):
            rows = torch.randn(8, heads // 8, 128).to(dtype)
            read, seconds = alternating(
                lambda: (keys.view(torch.float32).sum(), values.view(torch.float32).sum()),  # noqa: B023
                lambda: attend_rows(rows, keys, values, scale=0.1),  # noqa: B023
            )
            ratio = seconds / read
            name = str(dtype).removeprefix("torch.")
            text = f"{name}, {heads} heads: {1e3 * seconds:.1f} ms, a read {1e3 * read:.1f} ms, {ratio:.2f}x"
            met &= judged(ratio <= target, f"{text}, target {target:g}x")
    return met


def alternating(*actions: Callable[[], object]) -> list[float]:
    """Least processor time of this thread over 25 calls of each, in turn, so that all see the same machine."""
    times = np.full((26, len(actions)), np.inf)
    for number in range(len(times)):
        for place, action in enumerate(actions):
            start = time.thread_time()
            action()
            times[number, place] = time.thread_time() - start
    return times[1:].min(axis=0).tolist()


def tokens(options: argparse.Namespace) -> bool:
    """Time of a new token over documents of random keys and values."""
    sizes = Sizes(hidden=512, layers=4, heads=8, kv_heads=4, vocab=600)
    engine = make_engine(sizes, chunk_tokens=1024)
    lengths, times = [8192, 16384, 32768, 65536, 131072], []
    for length in lengths:
        prompt = make_prompt(sizes, length)
        cache, chunk = last_chunk(engine, prompt)
        run_chunk(engine, prompt, cache, chunk)
        times += alternating(partial(_one_token, engine, prompt, cache))
        print(f"{length} tokens: {1e3 * times[-1]:.2f} ms for a new token", flush=True)
    fit = np.polyfit(lengths, times, 1)
    residual = np.square(np.polyval(fit, lengths) - times).sum() / np.square(times - np.mean(times)).sum()
    return judged(1 - residual >= 0.98, f"linear in the length: R2 {1 - residual:.4f}, target 0.98")


def _one_token(engine: Engine, prompt: Prompt, cache: object) -> None:
    from megatron_v2pe.inference.cache.kv_cache import CacheStep

    step = CacheStep(
        stores=(cache,), is_chunk=False, owners=(1,)
    )  # kept by another rank: the cache stays as it is
    position = prompt.layout.next_position
    work = engine.runner.token_work([1], [position], rope_length=position, step=step)
    engine.runner.run([lambda: work])


def chunk_peak(length: int, chunk: int, cp: int) -> tuple[int, int]:
    """Peak of the last chunk on this rank, and bytes of its cache."""
    engine = make_engine(SMALL, cp=cp, chunk_tokens=chunk)
    prompt = make_prompt(SMALL, length)
    cache, last = last_chunk(engine, prompt)
    peak = peak_bytes(partial(run_chunk, engine, prompt, cache, last))
    return peak, cache.num_bytes


def memory(options: argparse.Namespace) -> bool:
    """A fixed chunk, documents of 32K and 128K tokens."""
    met = True
    for cp in (1, 2):
        peaks = {}
        for length in (32768, 131072):
            found = on_ranks(chunk_peak, cp, length, 4096, cp)
            peaks[length] = max(peak for peak, _ in found)
            row = kv_shape(
                SMALL.architecture(), layers=SMALL.layers, tp=1, element_bytes=4, kind="model"
            ).row_bytes
            ratio = max(held for _, held in found) / (length * row / cp)
            met &= judged(
                ratio <= 1.01, f"cp {cp}, {length} tokens: cache {ratio:.4f}x of the formula, target 1.01x"
            )
        growth = peaks[131072] / peaks[32768] - 1
        short, long = peaks[32768] / MIB, peaks[131072] / MIB
        text = f"cp {cp}: peak of a chunk of 4096, {short:.1f} MiB at 32K, {long:.1f} at 128K"
        met &= judged(growth <= 0.05, f"{text}, {growth:+.1%}, target +5%")
    return met


def further(options: argparse.Namespace) -> bool:
    """A second question about a document of 32K tokens."""
    engine = make_engine(SMALL, chunk_tokens=4096, keep_tokens=10**6)
    document = make_prompt(SMALL, 32768)
    generator, times = np.random.default_rng(1), []
    for _ in range(2):
        prompt = document.with_tokens(generator.integers(0, 600, 24).tolist())
        start = time.process_time()
        answer = engine.begin(prompt, sampling=Sampling(max_new_tokens=8))
        while not answer.is_done:
            engine.advance([answer])
        engine.finish(answer)
        times.append(time.process_time() - start)
    ratio = times[1] / times[0]
    text = f"first question {times[0]:.2f} s, second {times[1]:.3f} s, {ratio:.1%}, target 5%"
    return judged(ratio <= 0.05, text)


PARTS = {
    "prefill": prefill,
    "ranks": ranks,
    "attention": attention,
    "tokens": tokens,
    "memory": memory,
    "further": further,
}


def main() -> int:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--repeats", type=int, default=2, help="of a prefill (default 2)")
    parser.add_argument("--tokens", type=int, default=65536, help="of the prompt of `ranks` (default 65536)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    results = [PARTS[name](options) for name in options.parts or PARTS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
