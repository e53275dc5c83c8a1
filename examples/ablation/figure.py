"""Table and picture of the ablation: accuracy at each length, by the step of training and the step of the questions.

    WORK/seed_*/MODEL/report/predictions_*.jsonl  -->  WORK/ablation.csv, WORK/ablation.txt, WORK/ablation.png

A value is the mean over the seeds that all models have; bars and ranges go from the worst seed to the best. With
--docs the table of the readme and the picture of the documentation are renewed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from over_seeds import (
    ROOT,
    TRAINED_LENGTH,
    Accuracies,
    draw_spread,
    markdown,
    read_accuracies,
    read_asked,
    replace_between_marks,
    seeds_text,
    spread,
    stride_text,
    write_csv,
)

from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.inspection.figures import pyplot, save_figure

README = ROOT / "examples" / "ablation" / "README.md"
PICTURE = ROOT / "docs" / "images" / "ablation.png"


def training_text(model: str) -> str:
    """Name of a run as the table has it: `fixed_8_500` was trained with 8/64 in 500 steps."""
    kind, _, _ = model.rpartition("_")
    return f"fixed {stride_text(kind.removeprefix('fixed_'))}" if kind.startswith("fixed_") else kind


def of_shared_seeds(found: Accuracies) -> Accuracies:
    """The values of those seeds with which every model was trained and asked.

    Raises:
        SystemExit: there is none.
    """
    shared = set.intersection(*(set(seeds) for seeds in found.values()))
    if not shared:
        raise SystemExit(
            "no seed has a finished run of every model; finish one with run.sh, or name fewer --models"
        )
    return {key: {seed: seeds[seed] for seed in seeds if seed in shared} for key, seeds in found.items()}


def summary(found: Accuracies) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row for each kind of training and step, a column for each length."""
    lengths = sorted({length for _, _, length in found})
    header = ["trained with", "asked with", *(f"{n:,} ({n // TRAINED_LENGTH}x)" for n in lengths)]
    rows = [
        [
            training_text(model),
            stride_text(stride),
            *(spread(found[model, stride, length]) for length in lengths),
        ]
        for model, stride in dict.fromkeys((model, stride) for model, stride, _ in found)
    ]
    return header, rows


def draw(found: Accuracies, path: Path) -> None:
    """One panel for each length: steps of the questions on x, a line for each kind of training."""
    plt = pyplot()
    lengths = sorted({length for _, _, length in found})
    strides = list(dict.fromkeys(stride for _, stride, _ in found))
    models = list(dict.fromkeys(model for model, _, _ in found))
    size = (2.6 * len(lengths) + 1.2, 3.4)
    figure, panels = plt.subplots(
        1, len(lengths), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for length, panel in zip(lengths, panels.flat, strict=True):
        for shift, model in enumerate(models):
            places = np.arange(len(strides)) + 0.08 * (shift - (len(models) - 1) / 2)
            values = [found[model, stride, length] for stride in strides]
            draw_spread(panel, places, values, label=f"trained with {training_text(model)}")
        panel.set_xticks(range(len(strides)), [stride_text(s).replace(" ", "\n") for s in strides])
        panel.set_title(f"{length:,} tokens ({length // TRAINED_LENGTH}x)", fontsize=10)
        panel.set_xlabel("step of the questions")
        panel.grid(alpha=0.3)
        panel.set_ylim(-0.03, 1.05)
    panels.flat[0].set_ylabel("accuracy: mean and range")
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    save_figure(figure, path)


def main() -> None:
    """Read a work folder, write its table and picture, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder that run.sh filled")
    parser.add_argument(
        "--models", nargs="+", required=True, help="folder names of the runs, such as random_500, in order"
    )
    parser.add_argument("--docs", action="store_true", help="also renew the readme's table and its picture")
    arguments = parser.parse_args()
    every = read_accuracies(arguments.work)
    found: Accuracies = {
        key: seeds for name in arguments.models for key, seeds in every.items() if key[0] == name
    }
    missing = sorted(set(arguments.models) - {model for model, _, _ in found})
    if missing:
        raise SystemExit(f"{arguments.work}: holds no finished run named {', '.join(missing)}")
    found = of_shared_seeds(found)
    header, rows = summary(found)
    seeds = sorted(next(iter(found.values())))
    text = "\n".join([seeds_text(len(seeds), "mean (worst to best)"), *text_table(header, rows, align="<<>")])
    write_atomic(arguments.work / "ablation.txt", text + "\n")
    write_csv(found, arguments.work / "ablation.csv")
    draw(found, arguments.work / "ablation.png")
    print(text)
    if arguments.docs:
        asked = read_asked(arguments.work, arguments.models, seeds)
        replace_between_marks(
            README, "ablation figures", "\n" + asked.caption() + markdown(header, rows) + "\n"
        )
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
