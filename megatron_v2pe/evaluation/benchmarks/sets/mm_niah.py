"""MM-NIAH (Wang et al., Needle In A Multimodal Haystack, 2024), and the V2PE release's extension to 1M tokens.

    DATA/mm_niah_test/annotations/retrieval-text.jsonl     DATA/mm_niah_test/images/...   (as in the release)
    DATA/annotations/retrieval-text.jsonl                  DATA/images/...                (the test archive alone)
    DATA/long_mr_128k/test_long_mr_image_retrieval_64_128.jsonl                           (V2PE-Data/val)

Release: `V2PE:eval/mm_niah/eval_mm_niah.py`, `calculate_scores.py`, `eval_mm_niah_long.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Request,
    Response,
    Row,
    Score,
    interleave,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import first_existing, inside, json_file, jsonl_records, need
from megatron_v2pe.evaluation.benchmarks.sets.niah_bins import (
    LENGTHS,
    LONG_LENGTHS,
    Placed,
    cells_of,
    clean_bins,
    official_bins,
)
from megatron_v2pe.evaluation.metrics.needle import NeedleMode, needle_score

# Task and the unique samples of its published test file.
TASKS = {
    "retrieval-text": 3072,
    "counting-text": 3060,
    "reasoning-text": 3004,
    "retrieval-image": 3005,
    "counting-image": 2713,
    "reasoning-image": 2933,
}
_OPTION = "\nAnswer with the option's letter from the given choices directly."
_PHRASE = "\nAnswer the question using a single word or phrase."
_LONG_FILES = {"128k": "64_128", "256k": "128_256", "512k": "256_512", "1m": "512_1200"}
_LONG_TASKS = {
    "retrieval-image": "image_retrieval",
    "reasoning-image": "image_reasoning",
    "retrieval-text": "text_retrieval",
    "reasoning-text": "text_reasoning",
}


class MMNIAH(Benchmark):
    """Six tasks, 1K to 64K tokens."""

    name = "mm-niah"
    title = "MM-NIAH"
    metric = "accuracy; counting: share of right list items (Wang et al. 2024)"
    modes: tuple[Mode, ...] = ("release", "original", "clean")
    download = (
        "OpenGVLab/MM-NIAH of Hugging Face: mm_niah_test (annotations/, images/) into DATA/mm_niah_test/"
    )
    has_forced = True
    lengths: tuple[int, ...] = LENGTHS
    max_tiles = 5

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a task."""
        root = first_existing(data_dir / "mm_niah_test", data_dir)
        return [
            DataFile(
                set=task,
                path=root / "annotations" / f"{task}.jsonl",
                root=root / "images",
                published=published,
            )
            for task, published in TASKS.items()
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        for where, record in jsonl_records(file.path):
            yield self._request(record, file, where, forced)

    def _request(self, record: Mapping[str, Any], file: DataFile, where: str, forced: bool) -> Request:
        question = need(record, "context", str, where) + need(record, "question", str, where)
        names = list(need(record, "images_list", list, where))
        answer = need(record, "answer", (int, str, list), where)
        if "counting" in file.set and isinstance(answer, str):
            answer = _parsed_list(answer, where)
        choices = need(record, "meta.choices", (list, type(None)), where)
        pictures = need(record, "meta.choices_image_path", (list, type(None)), where)
        if choices:
            question += "".join(f"\n{chr(65 + i)}. {choice}" for i, choice in enumerate(choices)) + _OPTION
        elif pictures:
            question += "".join(f"\n{chr(65 + i)}. <image>" for i in range(len(pictures))) + _OPTION
            names += pictures
        elif not isinstance(answer, list):
            question += _PHRASE
        try:
            parts = interleave(question, [inside(file.root, name, where) for name in names])
        except ValueError as error:
            raise DataError(f"{where}: images_list: {error}") from None
        expected = chr(65 + answer) if isinstance(answer, int) else str(answer)
        return Request(
            id=f"{file.set}/{need(record, 'id', (int, str), where)}",
            parts=parts,
            max_new_tokens=320 if "counting" in file.set else 16,
            max_tiles=self.max_tiles,
            forced_answer=expected if forced else None,
            gold={
                "set": file.set,
                "answer": answer,
                "context_length": need(record, "meta.context_length", int, where),
                "placed_depth": need(record, "meta.placed_depth", (int, float, list), where),
            },
        )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Mean over eleven lengths of the mean over five depths, then over tasks; see `niah_bins`."""
        placed = [
            Placed(
                group=row.gold["set"].partition("@")[0],
                length=row.gold["context_length"],
                depth=row.gold["placed_depth"],
                value=_value(row, mode),
            )
            for row in rows
        ]
        cells = cells_of(placed, self.lengths)
        tasks = [task for task in TASKS if any(item.group == task for item in placed)]
        clean_by_length = {task: clean_bins(cells, task, self.lengths) for task in tasks}
        official_by_length = {task: official_bins(cells, task, self.lengths) for task in tasks}
        clean = {task: mean(_present(bins)) for task, bins in clean_by_length.items()}
        official = {task: mean(bins) for task, bins in official_by_length.items()}
        main, other = (clean, official) if mode == "clean" else (official, clean)
        metrics = _headline(main)
        for task in tasks:
            metrics[task] = main[task]
            metrics[f"{task} ({'official' if mode == 'clean' else 'clean'} mean)"] = other[task]
            metrics[f"{task} (micro)"] = mean([item.value for item in placed if item.group == task])
        notes = [] if "Avg" in metrics else [f"{len(tasks)} tasks of six: no mean over tasks"]
        below = sum(item.length < self.lengths[0] for item in placed)
        if below:
            notes.append(f"{below} rows below {self.lengths[0]} tokens count in the micro average alone")
        return Score(
            mode=mode,
            metrics=metrics,
            cells=cells,
            rows=row_scores(rows, [item.value for item in placed]),
            lengths=self.lengths,
            by_length=clean_by_length if mode == "clean" else official_by_length,
            notes=tuple(notes),
        )

    def recorded(self, path: Path) -> list[Row] | None:
        """Rows of `TASK.jsonl` as the release's script wrote them, also as `TASK-test/MODEL_TASK-test.jsonl`."""
        rows = []
        files = [path]
        if path.is_dir():
            files = sorted([*path.glob("*.jsonl"), *path.glob("*-test/*.jsonl")])
        for file in files:
            task = next((task for task in TASKS if task in file.name), None)
            if task is not None:
                rows += [_recorded_row(record, task, where) for where, record in jsonl_records(file)]
        return rows or None

    def compared(self, path: Path, rows: Sequence[Row], mode: Mode) -> list[str]:
        """Largest difference to the bins of each `TASK.scores.json`."""
        ours = self.score(rows, mode).by_length
        lines = []
        for task, bins in ours.items():
            file = (path if path.is_dir() else path.parent) / f"{task}.scores.json"
            if file.exists():
                recorded = need(json_file(file), f"{task}-test", list, str(file))
                worst = max(abs(own - other) for own, other in zip(bins, recorded, strict=False))
                lines.append(f"{task}: recorded bins differ by at most {worst:.2g}")
        return lines


class MMNIAHLong(MMNIAH):
    """64K to 1M tokens; the release's own number is of teacher-forced image retrieval."""

    name = "mm-niah-1m"
    title = "MM-NIAH-1M"
    metric = "accuracy of the forced answer's tokens, or of greedy answers (Ge et al., V2PE 2024)"
    download = "OpenGVLab/V2PE-Data of Hugging Face: val/long_mr_{128k,256k,512k,1m} into DATA/"
    lengths = LONG_LENGTHS
    max_tiles = 12

    def files(self, data_dir: Path) -> list[DataFile]:
        """Four tasks at four lengths; how many samples were published is not known."""
        return [
            DataFile(
                set=f"{task}@{length}",
                path=data_dir / f"long_mr_{length}" / f"test_long_mr_{stem}_{span}.jsonl",
                root=first_existing(data_dir / f"long_mr_{length}" / "images", data_dir),
            )
            for length, span in _LONG_FILES.items()
            for task, stem in _LONG_TASKS.items()
        ]


def _value(row: Row, mode: Mode) -> float:
    if row.response.forced_match is not None:
        return float(row.response.forced_match)
    return needle_score(row.gold["answer"], row.text, mode=cast(NeedleMode, mode))


def _headline(tasks: Mapping[str, float]) -> dict[str, float]:
    """Avg, Image and Text as in the card's table, where all their tasks are there."""
    metrics: dict[str, float] = {}
    for name, kind in (("Image", "image"), ("Text", "text")):
        values = [value for task, value in tasks.items() if task.endswith(kind)]
        if len(values) == 3:
            metrics[name] = mean(values)
    return {"Avg": mean(list(metrics.values())), **metrics} if len(metrics) == 2 else metrics


def _present(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _parsed_list(answer: str, where: str) -> list[Any]:
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise DataError(f"{where}: answer is {answer!r}, but a counting task's must be a list")
    return value


def _recorded_row(record: Mapping[str, Any], task: str, where: str) -> Row:
    answer = need(record, "answer", (int, str, list), where)
    if "counting" in task and isinstance(answer, str):
        answer = _parsed_list(answer, where)
    text = need(record, "response", (str, type(None)), where)
    name = f"{task}/{need(record, 'question_id', (int, str), where)}"
    return Row(
        # The release wrote None where a sample did not fit into memory.
        response=Response(
            id=name, text=text or "", error="the recorded run has no answer" if text is None else None
        ),
        gold={
            "set": task,
            "answer": answer,
            "context_length": need(record, "context_length", int, where),
            "placed_depth": need(record, "placed_depth", (int, float, list), where),
        },
    )
