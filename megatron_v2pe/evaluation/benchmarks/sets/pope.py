"""POPE (Li et al., 2023): is there a ... in the image? Random, popular and adversarial objects.

    DATA/pope/llava_pope_test.jsonl, DATA/pope/coco/coco_pope_random.json ..., DATA/pope/val2014/...

DATA is InternVL's folder `data`. Labels follow questions by order within a category. Release: `V2PE:eval/pope`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Request,
    Row,
    Score,
    group_cells,
    image_first,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import inside, jsonl_records, need
from megatron_v2pe.evaluation.metrics.open_answers import pope_says_yes

CATEGORIES = {"random": 2910, "popular": 3000, "adversarial": 3000}


class POPE(Benchmark):
    """8,910 yes-or-no questions."""

    name = "pope"
    title = "POPE"
    metric = "F1 of yes, mean over categories (Li et al. 2023)"
    download = "val2014 of COCO, coco_pope_*.json of POPE and LLaVA's llava_pope_test.jsonl into DATA/pope/"

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file of all questions."""
        root = data_dir / "pope"
        return [
            DataFile(
                set="all",
                path=root / "llava_pope_test.jsonl",
                root=root / "val2014",
                published=sum(CATEGORIES.values()),
            )
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        labels: dict[str, list[str]] = {}
        counts: dict[str, int] = {}
        for where, record in jsonl_records(file.path):
            category = need(record, "category", str, where)
            if category not in labels:
                path = file.path.parent / "coco" / f"coco_pope_{category}.json"
                labels[category] = [need(line, "label", str, at) for at, line in jsonl_records(path)]
                counts[category] = 0
            number = counts[category]
            counts[category] += 1
            if number >= len(labels[category]):
                raise DataError(f"{where}: question {number + 1} of {category}, which has fewer labels")
            image = inside(file.root, need(record, "image", str, where), where)
            yield Request(
                id=f"{category}/{number}",
                # The release's prompt is empty, which leaves a blank at the end of the question.
                parts=image_first(image, need(record, "text", str, where) + " "),
                max_new_tokens=100,
                max_tiles=6,
                gold={"set": category, "answer": labels[category][number]},
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """F1, accuracy and share of yes of each category, and their means."""
        is_right = []
        for row in rows:
            is_given = bool(row.text.strip()) or mode != "clean"
            said = pope_says_yes(row.text)
            is_right.append(float(is_given and said == (row.gold["answer"] == "yes")))
        metrics: dict[str, float] = {}
        categories = list(dict.fromkeys(row.gold["set"] for row in rows))
        for category in categories:
            chosen = [(r, v) for r, v in zip(rows, is_right, strict=True) if r.gold["set"] == category]
            metrics[f"F1 {category}"] = _f1(chosen)
            metrics[f"accuracy {category}"] = mean([value for _, value in chosen])
            metrics[f"yes {category}"] = mean([float(pope_says_yes(row.text)) for row, _ in chosen])
        first = {"F1": mean([metrics[f"F1 {category}"] for category in categories])}
        return Score(
            mode=mode,
            metrics=first | metrics,
            cells=group_cells([(row.gold["set"], v) for row, v in zip(rows, is_right, strict=True)]),
            rows=row_scores(rows, is_right),
        )


def _f1(rows: Sequence[tuple[Row, float]]) -> float:
    """F1 of the answer yes: 2 true positives / (2 true positives + false positives + false negatives)."""
    hits = sum(value == 1.0 for row, value in rows if row.gold["answer"] == "yes")
    missed = sum(value == 0.0 for row, value in rows if row.gold["answer"] == "yes")
    wrong = sum(value == 0.0 for row, value in rows if row.gold["answer"] != "yes")
    return 2 * hits / (2 * hits + wrong + missed) if hits else 0.0
