"""Table and picture of one kind of model over seeds: mean, worst and best seed at each length.

    WORK/seed_*/MODEL/report/predictions_*.jsonl  -->  WORK/seeds.csv, WORK/seeds.txt, WORK/seeds.png

The digit with which an answer begins counts: what is measured is which image was found. The tables of a single run
count the whole answer; some models repeat a right digit instead of ending, and the documentation says how often.

With --docs the table replaces what is between the comments `quickstart figures: begin` and `quickstart figures: end` of
both readmes, and the picture the one of the documentation.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import read_jsonl
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.inspection.figures import pyplot, save_figure

TRAINED_LENGTH, TOKENS_PER_TILE = 512, 64
ROOT = Path(__file__).resolve().parents[2]
READMES = (ROOT / "README.md", ROOT / "examples" / "quickstart" / "README.md")
PICTURE = ROOT / "docs" / "images" / "quickstart_accuracy.png"

# (model, stride of the questions, length) -> accuracy of each seed
Accuracies = Mapping[tuple[str, str, int], Mapping[str, float]]


def read_accuracies(work: Path, *, report: str = "report") -> Accuracies:
    """Share of right digits of each seed; every answer counts once.

    Args:
        work: folder of the scripts.
        report: name of the folders of evaluations.
    """
    found: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for path in sorted(work.glob(f"seed_*/*/{report}")):
        seed, model = path.parts[-3].removeprefix("seed_"), path.parts[-2]
        for stride, rows in _answers(path).items():
            right: dict[int, list[bool]] = defaultdict(list)
            for row in rows:
                right[row["length"]].append(_is_found(row))
            for length, each in right.items():
                found[model, stride, length][seed] = float(np.mean(each))
    if not found:
        raise SystemExit(
            f"{work}: holds no seed_*/MODEL/{report}/predictions_*.jsonl; run the script that fills it first"
        )
    return found


def _answers(report: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of each stride of the questions, the largest step first."""
    files = {path.stem.removeprefix("predictions_"): path for path in report.glob("predictions_*.jsonl")}
    by_step = sorted(files, key=lambda stride: -TOKENS_PER_TILE if stride == "default" else -int(stride))
    return {stride: [row for _, row in read_jsonl(files[stride])] for stride in by_step}


def _is_found(row: Mapping[str, Any]) -> bool:
    """The answer begins with the right digit, which is one token."""
    return bool(row["prediction"].startswith(row["answer"]))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the answers of a table are.

    Attributes:
        num_seeds: seeds of it.
        questions: of a seed with each step, by length.
        num_answers: all of them.
        num_repeated: those which begin with the right digit and do not end after it.
    """

    num_seeds: int
    questions: Sequence[int]
    num_answers: int
    num_repeated: int

    def caption(self) -> str:
        """Sentences before the table of the documentation."""
        *most, last = map(str, self.questions)
        asked = f"{', '.join(most)} and {last}" if most else last
        over = seeds_text(self.num_seeds, "mean (worst to best seed)")
        return (
            f"Accuracy over {over}; guessing gives 0.10. A seed decides the random\n"
            "weights, which sheets and prose the documents have, the order of the data and the strides that images\n"
            f"draw. Each seed was asked {asked} questions of these lengths with each step.\n"
            "The digit with which an answer begins counts; "
            f"{self.num_repeated:,} of {self.num_answers:,} answers begin with the right one\nand repeat it instead of "
            "ending.\n\n"
        )


def read_asked(work: Path, models: Collection[str], seeds: Collection[str]) -> Asked:
    """Count the answers of some models and seeds."""
    reports = [work / f"seed_{seed}" / model / "report" for model in models for seed in seeds]
    rows = [row for report in reports for each in _answers(report).values() for row in each]
    one = next(iter(_answers(reports[0]).values()))
    counts = Counter(row["length"] for row in one)
    return Asked(
        num_seeds=len(seeds),
        questions=[counts[length] for length in sorted(counts)],
        num_answers=len(rows),
        num_repeated=sum(_is_found(row) and row["prediction"] != row["answer"] for row in rows),
    )


def write_csv(found: Accuracies, path: Path) -> None:
    """Every value, one a line."""
    lines = ["model,stride,length,seed,accuracy"]
    for (model, stride, length), seeds in found.items():
        lines += [f"{model},{stride},{length},{seed},{value:.4f}" for seed, value in seeds.items()]
    write_atomic(path, "\n".join(lines) + "\n")


def spread(values: Mapping[str, float]) -> str:
    """Mean (worst to best seed); one seed is its value alone."""
    of = list(values.values())
    return f"{np.mean(of):.2f}" + (f" ({min(of):.2f} to {max(of):.2f})" if len(of) > 1 else "")


def seeds_text(count: int, shown: str) -> str:
    """How many seeds, and what is shown of them: `5 seeds: mean (...)`; of one its value alone is shown."""
    return f"{count} seeds: {shown}" if count > 1 else "1 seed"


def stride_text(stride: str) -> str:
    """A stride as the documentation writes it, such as `1/64`."""
    return (
        f"{TOKENS_PER_TILE}/{TOKENS_PER_TILE} (default)"
        if stride == "default"
        else f"{stride}/{TOKENS_PER_TILE}"
    )


def summary(found: Accuracies) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row for each stride, a column for each length."""
    lengths = sorted({length for _, _, length in found})
    header = ["visual step", *(f"{length:,} ({length // TRAINED_LENGTH}x)" for length in lengths)]
    pairs = dict.fromkeys((model, stride) for model, stride, _ in found)
    rows = [
        [stride_text(stride), *(spread(found[model, stride, length]) for length in lengths)]
        for model, stride in pairs
    ]
    return header, rows


def draw(found: Accuracies, path: Path) -> None:
    """Accuracy over length, a line for each stride; bars go from the worst seed to the best."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    lengths = sorted({length for _, _, length in found})
    num_seeds = max(map(len, found.values()))
    for shift, (model, stride) in enumerate(dict.fromkeys((model, stride) for model, stride, _ in found)):
        # Shifted a little, so that bars do not cover each other.
        places = np.array(lengths) * 1.03 ** (shift - 1)
        draw_spread(
            axes, places, [found[model, stride, length] for length in lengths], label=stride_text(stride)
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}\n({n // TRAINED_LENGTH}x)" for n in lengths])
    axes.minorticks_off()
    axes.axvline(TRAINED_LENGTH, color="0.4", linestyle="--", label="trained length")
    axes.axhline(0.1, color="0.4", linestyle=":", label="guessing")
    axes.set_ylim(0.0, 1.03)
    axes.set_xlabel("document in tokens (multiple of the trained length)")
    axes.set_ylabel("accuracy: mean, worst and best seed")
    axes.set_title(
        f"Retrieval by length and visual step, {num_seeds} seed{'s' * (num_seeds > 1)}", fontsize=11
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower left")
    save_figure(figure, path)


def draw_spread(axes: Any, places: Any, values: list[Mapping[str, float]], *, label: str) -> None:
    """A line through the means at `places`, with bars from the worst seed to the best."""
    means = np.array([np.mean(list(each.values())) for each in values])
    low = means - [min(each.values()) for each in values]
    high = [max(each.values()) for each in values] - means
    # Rounding may leave -1e-17, which matplotlib refuses.
    axes.errorbar(places, means, np.maximum([low, high], 0.0), marker="o", capsize=3, label=label)


def replace_between_marks(path: Path, name: str, text: str) -> None:
    """Put `text` between the two comments `NAME: begin` and `NAME: end` of a page."""
    page = path.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    if len(marks.findall(page)) != 1:
        raise SystemExit(f"{path}: does not have the two comments '{name}: begin' and '{name}: end' once")
    write_atomic(path, marks.sub(lambda found: found[1] + text + found[2], page))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    """Read a work folder, write its table and picture, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder that run.sh filled")
    parser.add_argument("--model", required=True, help="folder name of the runs, such as random_500")
    parser.add_argument(
        "--docs", action="store_true", help="also renew tables and picture of the documentation"
    )
    arguments = parser.parse_args()
    every = read_accuracies(arguments.work)
    found = {key: seeds for key, seeds in every.items() if key[0] == arguments.model}
    if not found:
        raise SystemExit(f"{arguments.work}: holds no run named {arguments.model}")
    header, rows = summary(found)
    seeds = sorted({seed for each in found.values() for seed in each})
    text = "\n".join([seeds_text(len(seeds), "mean (worst to best)"), *text_table(header, rows, align="<>")])
    write_atomic(arguments.work / "seeds.txt", text + "\n")
    write_csv(found, arguments.work / "seeds.csv")
    draw(found, arguments.work / "seeds.png")
    print(text)
    if arguments.docs:
        said = read_asked(arguments.work, [arguments.model], seeds).caption() + markdown(header, rows)
        for page in READMES:
            replace_between_marks(page, "quickstart figures", f"\n{said}\n")
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
