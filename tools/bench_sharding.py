"""Keys that travel, and how even ranks are, when documents lie whole on ranks (parallel.cp_sharding), beside zigzag.

    python tools/bench_sharding.py --cp 8 16 32 --pack-tokens 32768 131072 262144

Nothing runs in parallel: packs are made by the package's packer, cut by its index and counted. Draws of the release's
32K mixture by group: numbers are those of its list, lengths are assumed, for the list has none. Long-VQA evenly by
logarithm from 512 to 32,768 tokens, MileBench log-normal around 4,096, long retrieval evenly from 16,384 to 32,768.

sent: rows of keys of all ranks over those that a ring of whole zigzag shards sends, as Transformer Engine's is (the
native ring sends 75 % of them). busiest: rows received by the busiest rank, likewise. cost: slowest rank over the
mean, attention and linears. tokens: fullest rank over the mean. Tiles are shared evenly however documents lie. auto:
packs that `auto` cuts by document.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from megatron_v2pe.data.plan.packing import best_fit_packs
from megatron_v2pe.parallel.shards import assign_documents, rows_received, saves_enough

LONG_VQA, MILEBENCH, RETRIEVAL = 998_965, 879_179, 847_500  # draws of an epoch: samples times repeats
LONGEST, SHORTEST = 32_768, 256


def draw_lengths(count: int, generator: np.random.Generator) -> np.ndarray:
    """Lengths of samples of the mixture, int64 [count]."""
    weights = np.array([LONG_VQA, MILEBENCH, RETRIEVAL], dtype=np.float64)
    kind = generator.choice(3, size=count, p=weights / weights.sum())
    drawn = [
        np.exp(generator.uniform(np.log(512), np.log(LONGEST), count)),
        np.clip(np.exp(generator.normal(np.log(4096), 0.9, count)), SHORTEST, LONGEST),
        generator.uniform(LONGEST / 2, LONGEST, count),
    ]
    return np.choose(kind, drawn).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Numbers of one pack, over those of zigzag or of the mean rank."""

    sent: float
    busiest: float
    cost: float
    tokens: float
    is_auto: bool


def count_pack(lengths: tuple[int, ...], *, cp: int, linear_tokens: int) -> Counted:
    """Cut a pack and count."""
    holders = assign_documents(lengths, cp=cp, linear_tokens=linear_tokens)
    if holders is None:
        return Counted(sent=1.0, busiest=1.0, cost=1.0, tokens=1.0, is_auto=False)
    cost, tokens = np.zeros(cp), np.zeros(cp)
    for length, ranks in zip(lengths, holders, strict=True):
        cost[list(ranks)] += length * (length + linear_tokens) / len(ranks)
        tokens[list(ranks)] += length / len(ranks)
    received = np.array([rows_received(lengths, holders, rank) for rank in range(cp)])
    ring = (cp - 1) / cp * sum(lengths)  # of each rank
    return Counted(
        sent=float(received.mean() / ring),
        busiest=float(received.max() / ring),
        cost=float(cost.max() / cost.mean()),
        tokens=float(tokens.max() / tokens.mean()),
        is_auto=saves_enough(lengths, holders, cp=cp),
    )


def main() -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cp", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--pack-tokens", type=int, nargs="+", default=[32768, 131072, 262144])
    parser.add_argument("--packs", type=int, default=120, help="packs of each row (default 120)")
    parser.add_argument(
        "--linear-tokens", type=int, default=30720, help="L of the model (default InternLM2-2B)"
    )
    options = parser.parse_args()
    print("pack      cp    sent   busiest   cost mean (most)   tokens mean (most)   auto")
    for pack_tokens in options.pack_tokens:
        generator = np.random.default_rng(0)
        lengths = draw_lengths(options.packs * pack_tokens // 8192, generator)
        packs = best_fit_packs(lengths, np.zeros_like(lengths), max_tokens=pack_tokens, max_tiles=1 << 40)
        for cp in options.cp:
            padded = -(-lengths // (2 * cp)) * 2 * cp
            rows = [
                count_pack(tuple(padded[pack].tolist()), cp=cp, linear_tokens=options.linear_tokens)
                for pack in packs[: options.packs]
            ]
            means = {
                name: np.mean([getattr(row, name) for row in rows])
                for name in ("sent", "busiest", "cost", "tokens", "is_auto")
            }
            most_cost, most_tokens = max(row.cost for row in rows), max(row.tokens for row in rows)
            print(
                f"{pack_tokens:7d}  {cp:3d}  {means['sent']:6.1%}   {means['busiest']:6.1%}   "
                f"{means['cost']:8.3f} ({most_cost:.3f})    {means['tokens']:8.3f} ({most_tokens:.3f})   "
                f"{means['is_auto']:6.0%}"
            )


if __name__ == "__main__":
    main()
