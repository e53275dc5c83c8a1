"""Long-VQA of the V2PE release (Ge et al., 2024): 17 short VQA sets stretched to 32K to 64K tokens.

    DATA/long_vqa_32k/val_long_vqa_chartqa_16_32.jsonl, DATA/long_vqa_40k/val_long_vqa_chartqa_32_40.jsonl, ...

Release: `V2PE:eval/longvqa`. Both sides of an answer are rectified before they are compared (`metrics/rectify.py`).
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
    ScoreCell,
    interleave,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import inside, jsonl_records, need
from megatron_v2pe.evaluation.metrics.denotation import due_f1, due_text, wtq_match
from megatron_v2pe.evaluation.metrics.overlap import anls, bleu4, relaxed_correctness_owl
from megatron_v2pe.evaluation.metrics.rectify import Lexicon, nltk_lexicon, rectify
from megatron_v2pe.evaluation.metrics.vqa_text import vqa_soft_accuracy

# Set: (metric, longest answer).
SETS = {
    "chartqa": ("relaxed", 32),
    "clevr": ("relaxed", 8),
    "dvqa": ("relaxed", 8),
    "gqa": ("relaxed", 8),
    "ocrvqa": ("relaxed", 128),
    "svqa": ("exact", 8),
    "tabfact": ("exact", 8),
    "deepform": ("f1", 32),
    "kleistercharity": ("f1", 32),
    "docvqa": ("anls", 32),
    "infovqa": ("anls", 32),
    "okvqa": ("vqa", 16),
    "textvqa": ("vqa", 64),
    "vizwiz": ("vqa", 32),
    "textcaps": ("bleu4", 64),
    "visualmrc": ("bleu4", 256),
    "wikitablequestions": ("wtq", 128),
}
LENGTHS = {32: "16_32", 40: "32_40", 48: "40_48", 56: "48_56", 64: "56_64"}


class LongVQA(Benchmark):
    """17 sets at five lengths."""

    name = "long-vqa"
    title = "Long-VQA"
    metric = "each set's own: relaxed accuracy, accuracy, F1, ANLS, VQA accuracy, BLEU-4, denotation (Ge et al. 2024)"
    download = (
        "OpenGVLab/V2PE-Data of Hugging Face: val/long_vqa_{32k,40k,48k,56k,64k} with their images into DATA/"
    )

    def __init__(self) -> None:
        self._lexicon: Lexicon | None = None
        self._is_looked_for = False

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a set and length; how many samples each was published with is not known."""
        return [
            DataFile(
                set=f"{name}@{length}k",
                path=data_dir / f"long_vqa_{length}k" / f"val_long_vqa_{name}_{span}.jsonl",
                root=data_dir,
            )
            for length, span in LENGTHS.items()
            for name in SETS
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        name = file.set.partition("@")[0]
        for where, record in jsonl_records(file.path):
            turns = need(record, "conversations", list, where)
            if len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
                raise DataError(f"{where}: conversations must hold the question and the answer")
            images = record.get("image") or []
            paths = [inside(file.root, image, where) for image in images]
            try:
                parts = interleave(need(turns[0], "value", str, where), paths)
            except ValueError as error:
                raise DataError(f"{where}: image: {error}") from None
            yield Request(
                id=f"{file.set}/{need(record, 'id', (int, str), where)}",
                parts=parts,
                max_new_tokens=SETS[name][1],
                max_tiles=12,
                gold={
                    "set": name,
                    "length": int(file.set.partition("@")[2].rstrip("k")),
                    "answer": need(turns[1], "value", (str, list), where),
                },
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Each set at each length by its own metric; the average is the mean over sets of the mean over lengths."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            groups.setdefault((row.gold["set"], row.gold["length"]), []).append(row)
        cells: list[ScoreCell] = []
        scores: dict[str, float] = {}
        for (name, length), members in groups.items():
            value, values = self._group(name, members, mode)
            scores |= row_scores(members, values)
            cells.append(ScoreCell(group=name, length=length, total=value * len(members), count=len(members)))
        lengths = sorted({length for _, length in groups})
        sets = {name: mean([c.mean for c in cells if c.group == name]) for name in SETS}
        present = {name: value for name, value in sets.items() if value == value}
        by_length = {f"{n}K": mean([c.mean for c in cells if c.length == n]) for n in lengths}
        notes = []
        if len(present) < len(SETS):
            notes.append(f"mean of {len(present)} sets of {len(SETS)}")
        if mode == "release" and self._words() is None:
            notes.append(
                "nltk's word lists are not installed: -ing and plural forms are compared as they are"
            )
        return Score(
            mode=mode,
            metrics={"Avg": mean(list(present.values())), **by_length, **present},
            cells=tuple(cells),
            rows=scores,
            lengths=tuple(lengths),
            by_length={
                name: [
                    mean([c.mean for c in cells if c.group == name and c.length == length])
                    for length in lengths
                ]
                for name in present
            },
            notes=tuple(notes),
        )

    def _words(self) -> Lexicon | None:
        if not self._is_looked_for:
            self._lexicon, self._is_looked_for = nltk_lexicon(), True
        return self._lexicon

    def _group(self, name: str, rows: Sequence[Row], mode: Mode) -> tuple[float, list[float]]:
        """Score of a set at a length, and of each of its rows (their mean, but for BLEU)."""
        metric = SETS[name][0]
        pairs = [self._sides(row, name, mode) for row in rows]
        if metric == "bleu4":
            if mode == "clean" and not any(said.strip() for said, _ in pairs):
                return 0.0, [0.0] * len(rows)
            each = [bleu4([said], [answers]) for said, answers in pairs]
            return bleu4([said for said, _ in pairs], [answers for _, answers in pairs]), each
        values = [
            0.0 if mode == "clean" and not said.strip() else _value(metric, said, answers)
            for said, answers in pairs
        ]
        return mean(values), values

    def _sides(self, row: Row, name: str, mode: Mode) -> tuple[str, list[str]]:
        answer = row.gold["answer"]
        answers = [str(item) for item in answer] if isinstance(answer, list) else [str(answer)]
        if mode == "clean":
            return row.text.strip(), answers
        words = self._words()
        return (
            _trimmed(rectify(name, row.text, lexicon=words)),
            [_trimmed(rectify(name, item, lexicon=words)) for item in answers],
        )


def _trimmed(text: str) -> str:
    """No line breaks and no final period: the release's last step before a metric."""
    return text.replace("\n", "").strip().removesuffix(".")


def _value(metric: str, said: str, answers: list[str]) -> float:
    if metric == "relaxed":
        return max(relaxed_correctness_owl(said, answer) for answer in answers)
    if metric == "exact":
        return float(said in answers)
    if metric == "anls":
        return anls(said, answers, rule="owl")
    if metric == "vqa":
        return vqa_soft_accuracy(said, answers)
    if metric == "f1":
        return due_f1([("", said, answers)])
    return wtq_match(due_text(said), [due_text(answer) for answer in answers])
