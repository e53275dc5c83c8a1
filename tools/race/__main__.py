"""A training step of this package against plain PyTorch, and two ranks against one, on CPU: ratios of one run.

    python tools/race                              all of it; an hour on idle cores, most of it for 54m at 16,384
    python tools/race step --model tiny            one model, all lengths
    python tools/race step --model 54m --tokens 1024 4096
    python tools/race ranks                        cp 2 and dp 2 of the 54 M model on two cores, one rank on one

How to read it. All sides of a row start from the same weights and compute on the same packed tokens in one process of
one thread; their first losses must agree to 1e-6. They take turns, step by step, and a figure is the least processor
time of a step over the repeats: other work on the machine moves it little, but not nothing. Above 1.00x we are faster.
The plain side is what a careful user would write (`tools/race/plain_model.py`): logits of supervised tokens only, fused
AdamW, sines made once.

`ranks` gives wall times, which need idle cores, and the processor time of the busiest rank, which is what an idle
machine would need apart from waits. The row of two runs of one rank, which exchange nothing, is what the machine
allows: cores share their caches and their way to memory, and each run has an optimizer step of its own.

The release's own model is not here: its files are not ours to copy. To race it, take its modelling files, replace their
attention by scaled dot product attention of each document (their fast path runs on CUDA only), fill it from an exported
checkpoint, and step it beside these.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/, for bench_support

import torch
from bench_support.step import machine, on_ranks
from bodies import race, ranked
from sides import RaceSizes

TINY = dict(hidden=128, layers=4, heads=4, kv_heads=2, ffn=384, vocab=1039, vision_hidden=64, vision_layers=2)
MID = dict(
    hidden=512, layers=12, heads=8, kv_heads=4, ffn=896, vocab=16384, vision_hidden=384, vision_layers=6
)
MODELS = {"tiny": TINY, "54m": MID}
TOKENS = {"tiny": (64, 1024, 4096, 16384), "54m": (1024, 4096, 16384)}
TARGET_STEP, TARGET_RANKS = 1.0, 1.8
RANKED_STEPS = 2  # of a layout in its turn
MACHINE = "two runs of one rank, half the packs each"


def sizes_of(model: str, tokens: int, documents: int = 1) -> RaceSizes:
    """A model and a pack of which about a fifth of the tokens is visual and a quarter has a label."""
    tiles = max(documents, tokens // 16 // 5 // documents * documents)
    return RaceSizes(tokens=tokens, tiles=tiles, documents=documents, **MODELS[model])


def steps(options: argparse.Namespace) -> bool:
    """One row for each model and length."""
    show("model, tokens", "ours s", "plain s", "plain, full s", "plain / ours", "by repeat")
    show(*["---"] * 6)
    met = True
    for model in options.model or MODELS:
        rows = [(tokens, 1) for tokens in options.tokens or TOKENS[model]]
        if model == "tiny" and not options.tokens:
            rows.insert(2, (1024, 16))
        for tokens, documents in rows:
            sizes = sizes_of(model, tokens, documents)
            (taken,) = on_ranks(race, 1, sizes, options.repeats, options.seconds, options.full)
            best = {name: min(times) for name, times in taken.items()}
            by_repeat = [plain / ours for plain, ours in zip(taken["plain"], taken["ours"], strict=True)]
            ratio = best["plain"] / best["ours"]
            show(
                f"{model}, {tokens:,}" + (f" in {documents} documents" if documents > 1 else ""),
                *[f"{best[name]:.4f}" if name in best else "-" for name in ("ours", "plain", "plain, full")],
                f"{ratio:.2f}x",
                f"{min(by_repeat):.2f} to {max(by_repeat):.2f}x",
            )
            met = met and (tokens < 1024 or ratio >= TARGET_STEP)
    print(f"target from 1,024 tokens on: {TARGET_STEP:.2f}x: {'met' if met else 'MISSED'}")
    return met


def ranks(options: argparse.Namespace) -> bool:
    """cp 2 and dp 2 against one rank, the same packs for all; layouts take turns."""
    sizes, packs = sizes_of("54m", (options.tokens or [1024])[0]), options.packs
    layouts = {
        "one rank": (1, 1, packs),
        MACHINE: (1, 1, packs // 2),
        "cp 2": (2, 1, packs),
        "dp 2": (1, 2, packs // 2),
    }
    clocks = ("wall", "processor")
    best: dict[str, dict[str, float]] = {name: dict.fromkeys(clocks, float("inf")) for name in layouts}
    for _ in range(options.repeats):
        for name, layout in layouts.items():
            taken = strangers(sizes, *layout) if name == MACHINE else together(sizes, *layout)
            for clock in clocks:
                slowest = [max(times) for times in zip(*(rank[clock] for rank in taken), strict=True)]
                best[name][clock] = min(best[name][clock], *slowest)
    met = True
    print(f"54m, {packs} packs of {sizes.tokens:,} tokens a step")
    show("layout", "wall s", "processor s of the busiest rank", "speed by wall", "by processor")
    show(*["---"] * 5)
    for name, figures in best.items():
        speeds = [best["one rank"][clock] / figures[clock] for clock in clocks]
        show(name, *[f"{figures[clock]:.2f}" for clock in clocks], *[f"{speed:.2f}x" for speed in speeds])
        met = met and (name in ("one rank", MACHINE) or speeds[0] >= TARGET_RANKS)
    print(f"target by wall time, on idle cores: {TARGET_RANKS}x: {'met' if met else 'MISSED'}")
    return met


def together(sizes: RaceSizes, cp: int, dp: int, micro_batches: int) -> list[dict[str, list[float]]]:
    """Times of the ranks of a layout."""
    return on_ranks(ranked, cp * dp, sizes, RANKED_STEPS, cp, dp, micro_batches)


def strangers(sizes: RaceSizes, cp: int, dp: int, micro_batches: int) -> list[dict[str, list[float]]]:
    """Times of two runs of one rank that know nothing of each other, at the same time."""
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(together, sizes, cp, dp, micro_batches) for _ in range(2)]
        return [times for run in runs for times in run.result()]


def show(*cells: str) -> None:
    """A row of a table in Markdown."""
    print(f"| {' | '.join(cells)} |", flush=True)


PARTS = {"step": steps, "ranks": ranks}


def main() -> int:
    """Parse the command line, race, print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python tools/race", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=PARTS, help="one of the two; both when omitted")
    parser.add_argument("--model", action="append", choices=MODELS, help="step: only this one")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the pack; ranks: the first")
    parser.add_argument("--packs", type=int, default=4, help="ranks: packs of a step, an even number")
    parser.add_argument("--repeats", type=int, default=3, help="how often each figure is taken")
    parser.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="step: processor time of a side in a repeat, at least one step",
    )
    parser.add_argument("--full", action="store_true", help="step: also with logits of every token")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    torch.set_num_threads(1)
    met = True
    for part in [options.what] if options.what else PARTS:
        print(f"{part}: {machine()}, float32", flush=True)
        met = PARTS[part](options) and met
        print(f"load at the end {os.getloadavg()[0]:.1f}", flush=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
