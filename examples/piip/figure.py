"""Table and picture of the example: accuracy of each model against the FLOPs of its tower and projector, over seeds.

    WORK/seed_*/MODEL/report/cells or scores, metrics.jsonl   -->  WORK/piip.csv, WORK/piip.txt, WORK/piip.png

FLOPs are counted by torch in a forward pass of the built tower and projector on one picture. Its counter leaves out
bilinear samples and weighted sums; they are added as 10 for each value that is sampled.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_v2pe.assembly.backend_modules import choose_modules
from megatron_v2pe.assembly.build import build_projector, build_vision
from megatron_v2pe.assembly.compiled import choose_elementwise
from megatron_v2pe.batch.packed_batch import tile_shape
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import ParallelConfig, RunConfig, RuntimeConfig
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.inspection.figures import pyplot, save_figure
from megatron_v2pe.models.piip import attention
from megatron_v2pe.parallel.topology import init_distributed, resolve, shutdown

NAMES = {
    "plain": "plain, 8 px, 2 layers",
    "deep": "plain, 8 px, 5 layers",
    "pixels": "plain, 32 px, 1 layer",
    "piip": "PIIP, 8 and 32 px, 2 layers each",
    "llava": "the same, every branch read",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model over its seeds."""

    model: str
    mflops: float
    tokens: int
    accuracies: tuple[float, ...]
    step_ms: float


class _Everywhere:
    """In place of the counter's module tracker, which asks for gradients."""

    parents = ("Global",)

    def __enter__(self) -> _Everywhere:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


def measured_mflops(hf_folder: Path) -> float:
    """Millions of floating point operations of a forward pass of tower and projector on one picture."""
    arch = read_architecture(hf_folder)
    config = RunConfig(runtime=RuntimeConfig(dtype="float32"))
    context = init_distributed(resolve(ParallelConfig(), 1), seed=0)
    modules = choose_modules(config.parallel, dtype="float32")
    tower = build_vision(config, arch, modules, choose_elementwise(config.runtime), context).eval()
    projector = build_projector(config, arch, modules, choose_elementwise(config.runtime), context).eval()
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    sampled: list[int] = []
    plain_sample = attention.F.grid_sample

    def counting(maps: Any, where: Any, **options: Any) -> Any:
        found = plain_sample(maps, where, **options)
        sampled.append(found.numel())
        return found

    attention.F.grid_sample = counting
    try:
        with counter, torch.no_grad():
            projector(tower(torch.zeros(1, *tile_shape(arch.tile_sizes))))
    finally:
        attention.F.grid_sample = plain_sample
        shutdown()
    return (sum(counter.get_flop_counts()["Global"].values()) + 10 * sum(sampled)) / 1e6


def read_row(work: Path, model: str) -> Row | None:
    """Accuracy of each seed that has an answer file; None without any."""
    accuracies, seconds = [], []
    for seed in sorted(work.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_"))):
        scores = seed / model / "report" / "scores.json"
        if not scores.is_file():
            continue
        accuracies.append(exact(json.loads(scores.read_text())))
        lines = (seed / model / "metrics.jsonl").read_text().splitlines()
        seconds += [json.loads(line)["step_s"] for line in lines[len(lines) // 2 :]]
    if not accuracies:
        return None
    folder = next(iter(sorted(work.glob("seed_*")))) / "models" / model
    return Row(
        model=model,
        mflops=measured_mflops(folder),
        tokens=read_architecture(folder).tokens_per_tile,
        accuracies=tuple(accuracies),
        step_ms=1000 * float(np.median(seconds)),
    )


def exact(scores: dict[str, Any]) -> float:
    """Share of answers that equal the digit, from `scores.json` of one stride."""
    (values,) = scores.values()
    return float(values["exact"])


def table(rows: list[Row]) -> str:
    """One line for each model: mean (worst to best seed)."""
    lines = [
        [
            NAMES[row.model],
            f"{row.mflops:.1f}",
            str(row.tokens),
            f"{row.step_ms:.0f}",
            str(len(row.accuracies)),
            f"{np.mean(row.accuracies):.2f} ({min(row.accuracies):.2f} to {max(row.accuracies):.2f})",
        ]
        for row in rows
    ]
    header = ["tower", "MFLOPs a picture", "tokens", "ms a step", "seeds", "accuracy"]
    return "\n".join(text_table(header, lines, align="<>>>><"))


def draw(rows: list[Row], path: Path) -> None:
    """A point for each seed, a line for the mean."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for row in rows:
        points = panel.plot([row.mflops] * len(row.accuracies), row.accuracies, "o", alpha=0.6)
        panel.plot(
            row.mflops,
            np.mean(row.accuracies),
            "_",
            markersize=22,
            color=points[0].get_color(),
            label=NAMES[row.model],
        )
    panel.axhline(0.1, linestyle=":", color="grey", label="guessing")
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.03)
    panel.set_xlabel("MFLOPs of tower and projector for a picture, forward, counted by torch")
    panel.set_ylabel("accuracy")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Read a work folder, write its table and picture, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder that run.sh filled")
    work = parser.parse_args().work
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = [row for model in NAMES if (row := read_row(work, model)) is not None]
    if not rows:
        raise SystemExit(f"{work}: holds no seed_*/MODEL/report/scores.json; run examples/piip/run.sh first")
    text = table(rows)
    write_atomic(work / "piip.txt", text + "\n")
    lines = ["model,mflops,seed,accuracy"]
    lines += [
        f"{row.model},{row.mflops:.3f},{seed},{value:.4f}"
        for row in rows
        for seed, value in enumerate(row.accuracies)
    ]
    write_atomic(work / "piip.csv", "\n".join(lines) + "\n")
    draw(rows, work / "piip.png")
    print(text)


if __name__ == "__main__":
    main()
