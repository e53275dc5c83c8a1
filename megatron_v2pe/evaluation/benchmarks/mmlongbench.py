"""MMLongBench (Wang et al., 2025): needles and visual retrieval at 8K to 128K tokens, an outside judge of V2PE.

    DATA/mmlb_data/NIAH/retrieval-text_test_K8_dep6.jsonl, DATA/mmlb_data/vrag/infoseek_K8_dep3.jsonl, ...
    DATA/mmlb_image/...

Its authors ran V2PE-256K at strides 16, 64 and 256. Here are its categories NIAH and visual RAG. Many-shot ICL draws
its examples from Python's random state, summaries are judged by a paid model, and documents are a matter of its own
scorer: run those with its repository (EdinburghNLP/MMLongBench), against `serve`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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

LENGTHS = (8, 16, 32, 64, 128)
# Set: (file below mmlb_data, metric).
SETS = {
    "retrieval-text": ("NIAH/retrieval-text_test_K{}_dep6.jsonl", "contains"),
    "counting-text": ("NIAH/counting-text_test_K{}_dep3.jsonl", "sum"),
    "reasoning-text": ("NIAH/reasoning-text_test_K{}_dep3.jsonl", "contains"),
    "retrieval-image": ("NIAH/retrieval-image_test_K{}_dep6.jsonl", "letter"),
    "counting-image": ("NIAH/counting-image_test_K{}_dep3.jsonl", "sum"),
    "reasoning-image": ("NIAH/reasoning-image_test_K{}_dep3.jsonl", "letter"),
    "infoseek": ("vrag/infoseek_K{}_dep3.jsonl", "contains"),
    "viquae": ("vrag/viquae_K{}_dep6.jsonl", "contains"),
}
_NEEDLE = "You are given interleaved text and images. Please answer the question{} based on the given text and images. "
_FORMAT = "Write your answer in the following format:\nAnswer: [answer]\n\n"
_RAG = (
    "Use the given documents to write a concise and short answer to the question about the entity shown in the "
    "image. "
)


class MMLongBench(Benchmark):
    """Six needle tasks and two sets of visual retrieval, at five lengths."""

    name = "mmlongbench"
    title = "MMLongBench (NIAH, visual RAG)"
    metric = "substring match, accuracy of the letter, sum of the counted list (Wang et al. 2025)"
    modes: tuple[Mode, ...] = ("original", "clean")
    download = (
        "ZhaoweiWang/MMLongBench of Hugging Face: 0_mmlb_data.tar.gz, mm-niah and vrag images, into DATA/"
    )

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a set and length."""
        return [
            DataFile(
                set=f"{name}@{length}k",
                path=data_dir / "mmlb_data" / pattern.format(length),
                root=data_dir / "mmlb_image",
            )
            for length in LENGTHS
            for name, (pattern, _) in SETS.items()
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        name, _, length = file.set.partition("@")
        for number, (where, record) in enumerate(jsonl_records(file.path)):
            text, images = _prompt(name, record, where)
            try:
                parts = interleave(text, [inside(file.root, image, where) for image in images])
            except ValueError as error:
                raise DataError(f"{where}: image_list: {error}") from None
            depth = record.get("depth")
            yield Request(
                id=f"{file.set}/{number}-{record.get('id', number)}",
                parts=parts,
                max_new_tokens=128,
                max_tiles=12,
                gold={
                    "set": name,
                    "length": int(length.rstrip("k")),
                    "answer": need(record, "answer", (str, int, list), where),
                    "depth": depth if isinstance(depth, (int, float)) else None,
                },
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Mean over lengths of each set; NIAH and visual RAG are means over their sets."""
        values = [_value(row, mode) for row in rows]
        sums: dict[tuple[str, int], list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            sums.setdefault((row.gold["set"], row.gold["length"]), []).append(value)
        cells = tuple(
            ScoreCell(group=name, length=length, total=sum(found), count=len(found))
            for (name, length), found in sums.items()
        )
        lengths = sorted({length for _, length in sums})
        sets = {
            name: mean([c.mean for c in cells if c.group == name])
            for name in SETS
            if any(c.group == name for c in cells)
        }
        needles = [v for name, v in sets.items() if "-" in name]
        rag = [v for name, v in sets.items() if "-" not in name]
        metrics = {"NIAH": mean(needles)} if needles else {}
        metrics |= {"VRAG": mean(rag)} if rag else {}
        by_length = {f"{n}K": mean([c.mean for c in cells if c.length == n]) for n in lengths}
        return Score(
            mode=mode,
            metrics=metrics | by_length | sets,
            cells=cells,
            rows=row_scores(rows, values),
            lengths=tuple(lengths),
            by_length={
                name: [mean([c.mean for c in cells if (c.group, c.length) == (name, n)]) for n in lengths]
                for name in sets
            },
        )


def _prompt(name: str, record: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    question = need(record, "question", str, where)
    documents = need(record, "ctxs", list, where)
    if name in ("infoseek", "viquae"):
        context = "\n\n".join(
            f"Document (Title: {need(d, 'title', str, where)}): {need(d, 'text', str, where)}"
            for d in documents
        )
        text = f"{_RAG}{_FORMAT}{context}\n\nQuestion: <image>{question}\nAnswer:"
        return text, [need(record, "image", str, where)]
    context = "\n\n".join(need(document, "text", str, where) for document in documents)
    images = list(need(record, "image_list", list, where))
    letter = ""
    if SETS[name][1] == "letter":
        letter = " with the option's letter (A, B, etc.)"
        choices = need(record, "choices_image", list, where)
        question += "".join(f"\n{chr(65 + index)}. <image>" for index in range(len(choices)))
        images += choices
    elif name == "counting-image":
        images += need(record, "needle_image_list", list, where)
    return f"{_NEEDLE.format(letter)}{_FORMAT}{context}\n\nQuestion: {question}\nAnswer:", images


def _value(row: Row, mode: Mode) -> float:
    """The better of the whole answer and of what follows `Answer:`, as published; `clean` reads the latter alone."""
    metric = SETS[row.gold["set"]][1]
    after = re.search(r"(?is)answer:(.*)", row.text)
    parsed = (after.group(1) if after else row.text).strip()
    texts = [parsed] if mode == "clean" else [row.text, parsed]
    if mode == "clean" and not parsed:
        return 0.0
    return max(_one_value(metric, text, row.gold["answer"]) for text in texts)


def _one_value(metric: str, text: str, answer: Any) -> float:
    if metric == "contains":
        answers = answer if isinstance(answer, list) else [answer]
        return float(any(_plain(str(item)) in _plain(text) for item in answers))
    if metric == "sum":
        return float(sum(_counted(text)) == sum(answer))
    return float(_letter(text) == answer)


def _plain(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _counted(text: str) -> list[int]:
    """The last list of whole numbers of an answer, or all whole numbers in it."""
    for pattern in (r"\[[\d\s,]+\]", r"\[.*?\]"):
        found = re.findall(pattern, text, re.DOTALL)
        if found:
            try:
                return [int(item) for item in json.loads(found[-1]) if str(item).strip().isdecimal()]
            except ValueError:
                continue
    return [int(number) for number in re.findall(r"\d+", text)]


def _letter(text: str) -> int:
    """Option after `answer is` or `answer:`, else the last free-standing letter; -1 is none."""
    text = " ".join(text.split())
    for pattern in (r"answer is \(?([A-J])\)?", r"[aA]nswer:\s*([A-J])", r".*\b([A-J])\b"):
        found = re.search(pattern, text)
        if found:
            return ord(found.group(1)) - ord("A")
    return -1
