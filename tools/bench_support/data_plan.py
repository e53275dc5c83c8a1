"""Planning an epoch of the release's mixture: time, memory, fill, and how evenly 64 ranks are loaded.

Lengths are drawn for the 45 data sets of the release's mixture, whose names, sizes and repeats are published but whose
lengths are not: sets of Long-MR are named 16_32 and uniform in 16K..32K tokens, Long-VQA sets log-uniform in 1K..32K,
MileBench sets log-uniform in 1K..16K; 40 to 90 % of a sample's tokens are visual. Ranks are compared by the cost that
`data.balance` uses (`megatron_v2pe/data/samples/cost.py`, for InternVL2-2B). The release's packer gets the same
draws in random order; its packs are assigned in turn.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np
from bench_support.data_mixture import plan_of, random_draws, release_mixture
from bench_support.verdict import show_load, verdict

from megatron_v2pe.data.plan.packing import pack_fill, release_packs
from megatron_v2pe.data.plan.store import EpochPlan
from megatron_v2pe.data.report import step_imbalances

HELP = (
    "1.5 million samples of the release's mixture: time, memory, fill, imbalance, beside the release's packer"
)
TARGET_S, TARGET_GIB, TARGET_FILL, TARGET_IMBALANCE = 60.0, 1.0, 0.995, 1.03
RANKS = 64
RELEASE_DRAWS = 200_000  # its packer is slower, and its fill and imbalance do not depend on the number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench_data.py plan`."""
    parser.add_argument("--scale", type=float, default=1.0, help="share of the mixture's samples (default 1)")


def run(arguments: argparse.Namespace) -> None:
    """Plan one epoch at two pack sizes."""
    show_load()
    indexes = release_mixture(scale=arguments.scale)
    count = sum(len(index) for index in indexes)
    print(f"{len(indexes)} data sets, {count:,} samples; {_peak_gib():.2f} GiB before planning", flush=True)
    for pack_tokens in (32768, 262144):
        name = f"plan, packs of {pack_tokens // 1024}K"
        wall, cpu = time.perf_counter(), time.process_time()
        plan = plan_of(indexes, pack_tokens=pack_tokens, batch_size=RANKS)
        epoch = plan.epoch(0, 0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(
            f"\n{len(epoch.rows):,} draws -> {epoch.num_packs:,} packs in {wall:.1f} s of wall time",
            flush=True,
        )
        verdict(name, f"{cpu:.1f} s of processor time", target=f"< {TARGET_S:g} s", is_met=cpu < TARGET_S)
        peak = _peak_gib()
        verdict(name, f"peak {peak:.2f} GiB", target=f"< {TARGET_GIB:g} GiB", is_met=peak < TARGET_GIB)
        tokens, _, _ = plan.pack_totals(epoch)
        fill = tokens.sum() / (pack_tokens * len(tokens))
        verdict(name, f"{fill:.2%} full", target=f">= {TARGET_FILL:.1%}", is_met=fill >= TARGET_FILL)
        for batch in (RANKS, 4 * RANKS):
            other = (
                epoch
                if batch == RANKS
                else plan_of(indexes, pack_tokens=pack_tokens, batch_size=batch).epoch(0, 0)
            )
            found = _imbalances(np.asarray(other.costs), batch, by_cost=True)
            is_met = float(found.mean()) <= TARGET_IMBALANCE
            verdict(
                f"{name}, {batch} a step", _imbalance(found), target=f"<= {TARGET_IMBALANCE}", is_met=is_met
            )
        _release(indexes, epoch, pack_tokens)


def _release(indexes: Any, epoch: EpochPlan, pack_tokens: int) -> None:
    lengths, tiles, costs = random_draws(indexes, epoch, RELEASE_DRAWS)
    started = time.process_time()
    packs = release_packs(lengths, tiles, max_tokens=pack_tokens, max_tiles=pack_tokens // 128)
    seconds = time.process_time() - started
    fill = pack_fill(packs, lengths, max_tokens=pack_tokens)
    in_order = np.array([costs[pack].sum() for pack in packs])
    found = _imbalances(in_order, RANKS, by_cost=False)
    print(
        f"beside it the release's packer on {len(lengths):,} of the draws: {seconds:.1f} s, {fill:.2%} full, "
        f"{_imbalance(found)}"
    )


def _imbalances(costs: Any, batch: int, *, by_cost: bool) -> Any:
    """Slowest rank over the mean in each whole step of `batch` packs."""
    return step_imbalances(costs, np.full(len(costs) // batch, batch), RANKS, by_cost=by_cost)


def _imbalance(found: Any) -> str:
    return (
        f"slowest of {RANKS} ranks / mean {found.mean():.4f} (95th percentile of {len(found)} steps "
        f"{np.quantile(found, 0.95):.4f})"
    )


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
