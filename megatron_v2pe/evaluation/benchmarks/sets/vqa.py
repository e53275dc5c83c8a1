"""Questions about one chart, page or drawing with a short answer: ChartQA, DocVQA, InfoVQA, AI2D.

    DATA/chartqa/test_human.jsonl, test_augmented.jsonl
    DATA/docvqa/val.jsonl, DATA/docvqa/val/val_v1.0.json (the answers)
    DATA/infographicsvqa/val.jsonl, DATA/infographicsvqa/infographicsVQA_val_v1.0_withQT.json
    DATA/ai2diagram/test_vlmevalkit.jsonl

DATA is InternVL's folder `data`; paths of images in the files begin with `data/`.
Release: `V2PE:eval/vqa/evaluate_vqa.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from megatron_v2pe.evaluation.benchmarks.files import inside, json_file, jsonl_records, need
from megatron_v2pe.evaluation.metrics.overlap import anls, exact, relaxed_correctness

PHRASE = " Answer the question using a single word or phrase."
MetricName = Literal["relaxed", "anls", "exact"]


@dataclass(frozen=True, kw_only=True)
class VqaSplit:
    """One file of a VQA benchmark.

    Attributes:
        name: split.
        file: below the data folder.
        count: published questions.
        answers: file with the answers by question id; empty where the questions hold them.
    """

    name: str
    file: str
    count: int
    answers: str = ""


class VqaBenchmark(Benchmark):
    """A benchmark of InternVL's VQA family; its score is the mean over splits of the mean over questions."""

    def __init__(
        self,
        name: str,
        title: str,
        *,
        metric: MetricName,
        paper: str,
        splits: Sequence[VqaSplit],
        max_tiles: int,
        max_new_tokens: int,
        prompt: str,
        download: str,
    ) -> None:
        self.name, self.title, self.metric, self.download = name, title, paper, download
        self._metric, self._splits, self._prompt = metric, splits, prompt
        self.max_tiles, self.max_new_tokens = max_tiles, max_new_tokens

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a split."""
        return [
            DataFile(set=split.name, path=data_dir / split.file, root=data_dir, published=split.count)
            for split in self._splits
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        split = next(split for split in self._splits if split.name == file.set)
        answers = _answers(file.root / split.answers) if split.answers else None
        for number, (where, record) in enumerate(jsonl_records(file.path)):
            name = need(record, "image", str, where).removeprefix("data/")
            question = need(record, "question", str, where)
            key = record.get("question_id", number)
            yield Request(
                # Some published files repeat question ids, so the line is part of the name.
                id=f"{file.set}/{number}-{key}",
                parts=image_first(inside(file.root, name, where), question + self._prompt),
                max_new_tokens=self.max_new_tokens,
                max_tiles=self.max_tiles,
                gold={"set": file.set, "answers": _gold(record, answers, key, where)},
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """See the class."""
        values = [self._value(row, mode) for row in rows]
        cells = group_cells([(row.gold["set"], value) for row, value in zip(rows, values, strict=True)])
        sets = {cell.group: cell.mean for cell in cells}
        absent = [split.name for split in self._splits if split.name not in sets]
        metrics = {"score": mean(list(sets.values()))} | (sets if len(self._splits) > 1 else {})
        notes = (f"without {', '.join(absent)}",) if absent else ()
        return Score(mode=mode, metrics=metrics, cells=cells, rows=row_scores(rows, values), notes=notes)

    def _value(self, row: Row, mode: Mode) -> float:
        answers, text = row.gold["answers"], row.text
        if mode == "clean" and not text.strip():
            return 0.0
        if self._metric == "relaxed":
            return max(relaxed_correctness(text, answer) for answer in answers)
        return anls(text, answers) if self._metric == "anls" else exact(text, answers)


def _answers(path: Path) -> dict[Any, list[str]]:
    content = json_file(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be an object with a list data")
    found = {}
    for number, record in enumerate(need(content, "data", list, str(path))):
        where = f"{path}: data[{number}]"
        found[need(record, "questionId", (int, str), where)] = need(record, "answers", list, where)
    return found


def _gold(
    record: dict[str, Any], answers: dict[Any, list[str]] | None, key: int | str, where: str
) -> list[str]:
    if answers is None:
        value = need(record, "answer", (str, int, float, list), where)
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if key not in answers:
        raise DataError(f"{where}: question_id {key!r} has no answers in the annotation file")
    return answers[key]


def chartqa() -> VqaBenchmark:
    """Charts; mean of the human and the augmented questions."""
    return VqaBenchmark(
        "chartqa",
        "ChartQA",
        metric="relaxed",
        paper="relaxed accuracy, 5 % (Masry et al. 2022)",
        splits=[
            VqaSplit(name="human", file="chartqa/test_human.jsonl", count=1250),
            VqaSplit(name="augmented", file="chartqa/test_augmented.jsonl", count=1250),
        ],
        max_tiles=12,
        max_new_tokens=100,
        prompt=PHRASE,
        download="ChartQA of its authors (test/png) and InternVL's test_human.jsonl, test_augmented.jsonl into "
        "DATA/chartqa/",
    )


def docvqa() -> VqaBenchmark:
    """Pages of documents, validation split."""
    return VqaBenchmark(
        "docvqa",
        "DocVQA (val)",
        metric="anls",
        paper="ANLS, threshold 0.5 (Biten et al. 2019)",
        splits=[
            VqaSplit(name="val", file="docvqa/val.jsonl", count=5349, answers="docvqa/val/val_v1.0.json")
        ],
        max_tiles=18,
        max_new_tokens=100,
        prompt=PHRASE,
        download="Task 1 of rrc.cvc.uab.es (val/documents, val/val_v1.0.json) and InternVL's val.jsonl into "
        "DATA/docvqa/",
    )


def infovqa() -> VqaBenchmark:
    """Infographics, validation split."""
    return VqaBenchmark(
        "infovqa",
        "InfoVQA (val)",
        metric="anls",
        paper="ANLS, threshold 0.5 (Biten et al. 2019)",
        splits=[
            VqaSplit(
                name="val",
                file="infographicsvqa/val.jsonl",
                count=2801,
                answers="infographicsvqa/infographicsVQA_val_v1.0_withQT.json",
            )
        ],
        max_tiles=24,
        max_new_tokens=100,
        prompt=PHRASE,
        download="Task 3 of rrc.cvc.uab.es (images, infographicsVQA_val_v1.0_withQT.json) and InternVL's val.jsonl "
        "into DATA/infographicsvqa/",
    )


def ai2d() -> VqaBenchmark:
    """Diagrams of textbooks; the question holds its options and instruction."""
    return VqaBenchmark(
        "ai2d",
        "AI2D (test)",
        metric="exact",
        paper="accuracy of the option's letter (Kembhavi et al. 2016)",
        splits=[VqaSplit(name="test", file="ai2diagram/test_vlmevalkit.jsonl", count=3088)],
        max_tiles=6,
        max_new_tokens=10,
        prompt="",
        download="OpenGVLab/InternVL of Hugging Face: ai2d_test_vlmevalkit.zip (AI2D_TEST/, test_vlmevalkit.jsonl) "
        "into DATA/ai2diagram/",
    )
