"""Table and picture of the ablation: accuracy at each length, by the step of training and the step of the questions.

    WORK/seed_*/MODEL/report/cells.csv  -->  WORK/ablation.csv, WORK/ablation.txt, WORK/ablation.png

A value is the mean over seeds; bars and ranges go from the worst seed to the best.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.inspection.figures import pyplot, save_figure

# (model, stride of the questions, length) -> accuracy of each seed
Accuracies = dict[tuple[str, str, int], dict[str, float]]


def read_accuracies(work: Path) -> Accuracies:
    """Share of right answers of each seed; every answer counts once."""
    found: Accuracies = defaultdict(dict)
    for path in sorted(work.glob("seed_*/*/report/cells.csv")):
        seed, model = path.parts[-4].removeprefix("seed_"), path.parts[-3]
        sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                total = sums[row["stride"], int(row["length"])]
                total[0] += int(row["correct"])
                total[1] += int(row["count"])
        for (stride, length), (correct, count) in sums.items():
            found[model, stride, length][seed] = correct / count
    return found


def table(found: Accuracies) -> str:
    """One row for each model and step, one column for each length: mean (worst to best seed)."""
    lengths = sorted({length for _, _, length in found})
    rows = []
    for model, stride in dict.fromkeys((model, stride) for model, stride, _ in found):
        values = [list(found[model, stride, length].values()) for length in lengths]
        cells = [f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in values]
        rows.append([model, stride, str(len(values[0])), *cells])
    header = ["trained with", "asked with", "seeds", *map(str, lengths)]
    return "\n".join(text_table(header, rows, align="<<>"))


def draw(found: Accuracies, path: Path) -> None:
    """One panel for each length: steps of the questions on x, a line for each kind of training."""
    plt = pyplot()
    lengths = sorted({length for _, _, length in found})
    strides = list(dict.fromkeys(stride for _, stride, _ in found))
    models = list(dict.fromkeys(model for model, _, _ in found))
    size = (2.9 * len(lengths) + 1.2, 3.4)
    figure, panels = plt.subplots(
        1, len(lengths), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for length, panel in zip(lengths, panels.flat, strict=True):
        for shift, model in enumerate(models):
            values = [list(found[model, stride, length].values()) for stride in strides]
            means = np.array([np.mean(v) for v in values])
            spread = [means - [min(v) for v in values], [max(v) for v in values] - means]
            places = np.arange(len(strides)) + 0.08 * (shift - (len(models) - 1) / 2)
            panel.errorbar(places, means, spread, marker="o", capsize=3, label=model)
        panel.set_xticks(range(len(strides)), strides)
        panel.set_title(f"{length:,} tokens", fontsize=10)
        panel.set_xlabel("step of the questions")
        panel.grid(alpha=0.3)
        panel.set_ylim(0, 1.03)
    panels.flat[0].set_ylabel("accuracy: mean, worst and best seed")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    save_figure(figure, path)


def main() -> None:
    """Read a work folder, write its table and picture, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder that run.sh filled")
    work = parser.parse_args().work
    found = read_accuracies(work)
    if not found:
        raise SystemExit(
            f"{work}: holds no seed_*/MODEL/report/cells.csv; run examples/ablation/run.sh first"
        )
    text = table(found)
    write_atomic(work / "ablation.txt", text + "\n")
    lines = ["model,stride,length,seed,accuracy"]
    for (model, stride, length), seeds in found.items():
        lines += [f"{model},{stride},{length},{seed},{value:.4f}" for seed, value in seeds.items()]
    write_atomic(work / "ablation.csv", "\n".join(lines) + "\n")
    draw(found, work / "ablation.png")
    print(text)


if __name__ == "__main__":
    main()
