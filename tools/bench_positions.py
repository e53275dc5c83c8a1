"""Time and memory of the positions of one shard of a very long sample.

    python tools/bench_positions.py --tokens 1048576 --tiles 4000 --shards 8

Prints, for each shard: wall time (median and best of the repeats), peak of numpy's allocations during the call
relative to the shard's own int64 array, and how the process's resident memory moved. A sample this long is never
laid out token by token, so cost follows the shard, not the sample. Targets: 5 ms, 4 times the local array.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc

import numpy as np
import psutil

from megatron_v2pe.parallel.zigzag import shard_ranges
from megatron_v2pe.v2pe.layout import Int64Array, PackLayout, SampleLayout, pack_layout
from megatron_v2pe.v2pe.positions import position_units
from megatron_v2pe.v2pe.strides import image_strides

TOKENS_PER_TILE = 256
TARGET_MS, TARGET_RATIO = 5.0, 4.0


def spread_tiles(num_tokens: int, num_tiles: int) -> PackLayout:
    """One sample whose tiles are images of their own, spread evenly, with random strides."""
    text = num_tokens - num_tiles * TOKENS_PER_TILE
    if text < num_tiles + 1:
        raise SystemExit(f"{num_tiles} tiles of {TOKENS_PER_TILE} tokens do not fit {num_tokens} tokens")
    starts = np.arange(num_tiles) * TOKENS_PER_TILE + np.arange(1, num_tiles + 1) * text // (num_tiles + 1)
    strides = image_strides(
        "v2pe_random", num_tiles, tokens_per_tile=TOKENS_PER_TILE, generator=np.random.default_rng(0)
    )
    sample = SampleLayout(
        num_tokens=num_tokens,
        image_starts=starts.astype(np.int64),
        num_tiles=np.ones(num_tiles, np.int64),
        strides=strides,
        tokens_per_tile=TOKENS_PER_TILE,
    )
    return pack_layout([sample])


def measure(layout: PackLayout, ranges: Int64Array, repeats: int) -> tuple[float, float, float]:
    """Median ms, best ms, and peak bytes over the bytes of the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        units = position_units(layout, ranges)
        times.append((time.perf_counter() - start) * 1e3)
    tracemalloc.start()  # after the timing: it slows allocation down
    position_units(layout, ranges)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(times), min(times), peak / units.nbytes


def main() -> None:
    """Parse the command line, measure each shard, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--tiles", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    layout = spread_tiles(options.tokens, options.tiles)
    process = psutil.Process()
    print(f"{options.tokens} tokens, {options.tiles} tiles, shard of 1/{options.shards}")
    worst_ms, worst_ratio = 0.0, 0.0
    for rank in range(options.shards):
        ranges = shard_ranges(layout.cu_seqlens, cp=options.shards, cp_rank=rank)
        before = process.memory_info().rss
        median, best, ratio = measure(layout, ranges, options.repeats)
        moved = (process.memory_info().rss - before) / 2**20
        print(
            f"shard {rank}: {median:.2f} ms (best {best:.2f}), peak {ratio:.2f}x local, rss {moved:+.1f} MiB"
        )
        worst_ms, worst_ratio = max(worst_ms, median), max(worst_ratio, ratio)
    print(f"worst: {worst_ms:.2f} ms of {TARGET_MS:g}, {worst_ratio:.2f}x of {TARGET_RATIO:g}x")


if __name__ == "__main__":
    main()
