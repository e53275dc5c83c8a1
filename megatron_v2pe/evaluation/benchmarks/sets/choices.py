"""Multiple choice about one image: ScienceQA-IMG, MMBench-EN, SEED-Bench (images).

    DATA/scienceqa/scienceqa_test_img.jsonl, DATA/scienceqa/images/...
    DATA/mmbench/mmbench_dev_en_20231003.tsv, mmbench_test_en_20231003.tsv   (images are in the files)
    DATA/SEED/seed.jsonl, DATA/SEED/SEED-Bench.json, DATA/SEED/SEED-Bench-image/...

DATA is InternVL's folder `data`. Release: `V2PE:eval/scienceqa`, `eval/mmbench`, `eval/seed`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Part,
    Request,
    Row,
    Score,
    group_cells,
    image_first,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import (
    first_existing,
    inside,
    json_file,
    jsonl_records,
    need,
    tsv_records,
)
from megatron_v2pe.evaluation.metrics.letters import clean_choice, internvl_choice, letter_of

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
_CIRCULAR = 1_000_000  # MMBench's circular copies of question n are n + 1e6, n + 2e6, ...


def letter_value(text: str, answer: str, options: Mapping[str, str], mode: Mode) -> float:
    """Whether an answer names the right option."""
    if mode == "clean":
        return float(clean_choice(text, list(options)) == answer)
    return float(internvl_choice(text, dict(options)) == answer)


def lettered(options: Mapping[str, str]) -> str:
    """One line an option."""
    return "\n".join(f"{letter}. {option}" for letter, option in options.items())


class ScienceQA(Benchmark):
    """Questions of school tests that come with an image."""

    name = "scienceqa"
    title = "ScienceQA-IMG (test)"
    metric = "accuracy (Lu et al. 2022)"
    download = (
        "derek-thomas/ScienceQA of Hugging Face (test images) and InternVL's scienceqa_test_img.jsonl into "
        "DATA/scienceqa/"
    )

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file."""
        path = data_dir / "scienceqa" / "scienceqa_test_img.jsonl"
        return [DataFile(set="test", path=path, root=data_dir, published=2017)]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        for number, (where, record) in enumerate(jsonl_records(file.path)):
            choices = need(record, "choices", list, where)
            options = {letter_of(index): str(choice) for index, choice in enumerate(choices)}
            answer = need(record, "answer", int, where)
            if not 0 <= answer < len(choices):
                raise DataError(f"{where}: answer is {answer}, but there are {len(choices)} choices")
            hint = record.get("hint") or ""
            question = need(record, "question", str, where)
            text = (f"{hint}\n" if hint else "") + f"{question}\n{lettered(options)}\n{LETTER_PROMPT}"
            image = need(record, "image", str, where).removeprefix("data/")
            yield Request(
                id=str(number),
                parts=image_first(inside(file.root, image, where), text),
                max_new_tokens=100,
                max_tiles=6,
                gold={"set": "test", "answer": letter_of(answer), "options": options},
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Share of right letters."""
        values = [letter_value(row.text, row.gold["answer"], row.gold["options"], mode) for row in rows]
        return Score(
            mode=mode,
            metrics={"accuracy": mean(values)},
            cells=group_cells([("test", value) for value in values]),
            rows=row_scores(rows, values),
        )


class MMBench(Benchmark):
    """MMBench in English; the answers of its test split are with its server."""

    name = "mmbench-en"
    title = "MMBench-EN"
    metric = "accuracy; circular: right in every rotation of the options (Liu et al. 2023)"
    download = "mmbench_dev_en_20231003.tsv and mmbench_test_en_20231003.tsv of the MMBench project into DATA/mmbench/"

    def files(self, data_dir: Path) -> list[DataFile]:
        """Development and test split."""
        sizes = {"dev": 4329, "test": 6666}
        return [
            DataFile(
                set=split,
                path=data_dir / "mmbench" / f"mmbench_{split}_en_20231003.tsv",
                root=data_dir,
                published=size,
            )
            for split, size in sizes.items()
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        images: dict[str, bytes] = {}
        for where, record in tsv_records(file.path):
            index = need(record, "index", str, where)
            images[index] = _image(need(record, "image", str, where), images, where)
            options = {letter: record[letter] for letter in "ABCDE" if _is_given(record.get(letter))}
            hint = record.get("hint")
            lead = f"{hint}\n" if _is_given(hint) else ""
            text = f"{lead}{need(record, 'question', str, where)}\n{lettered(options)}\n{LETTER_PROMPT}"
            yield Request(
                id=f"{file.set}/{index}",
                parts=(Part(kind="image", data=images[index]), Part(kind="text", text=f"\n{text}")),
                max_new_tokens=100,
                max_tiles=6,
                gold={
                    "set": file.set,
                    "answer": record.get("answer") or None,
                    "options": options,
                    "category": record.get("category") or "",
                    "index": index,
                },
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Of the rows whose answer is known: each alone, and all rotations of a question together."""
        known = [row for row in rows if row.gold["answer"] is not None]
        values = [letter_value(row.text, row.gold["answer"], row.gold["options"], mode) for row in known]
        together: dict[int, float] = {}
        for row, value in zip(known, values, strict=True):
            question = int(row.gold["index"]) % _CIRCULAR
            together[question] = min(value, together.get(question, 1.0))
        metrics = {}
        if known:
            metrics = {"accuracy (circular)": mean(list(together.values())), "accuracy": mean(values)}
        notes = []
        if len(known) < len(rows):
            notes.append(
                f"{len(rows) - len(known)} rows of the test split: its server alone knows the answers"
            )
        return Score(
            mode=mode,
            metrics=metrics,
            cells=group_cells([(r.gold["category"], v) for r, v in zip(known, values, strict=True)]),
            rows=row_scores(known, values),
            notes=tuple(notes),
        )


class SeedImage(Benchmark):
    """SEED-Bench, question types 1 to 9 (images)."""

    name = "seed-i"
    title = "SEED-Bench (image)"
    metric = "accuracy, first letter (Li et al. 2023)"
    download = (
        "AILab-CVC/SEED-Bench of Hugging Face (SEED-Bench-image, SEED-Bench.json) and InternVL's seed.jsonl into "
        "DATA/SEED/"
    )

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file of questions; the annotation beside it says their types."""
        root = first_existing(data_dir / "SEED", data_dir / "tSEED", data_dir)
        return [DataFile(set="image", path=root / "seed.jsonl", root=root, published=14232)]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        path = file.path.parent / "SEED-Bench.json"
        content = json_file(path)
        known: dict[str, Mapping[str, Any]] = {
            str(need(record, "question_id", (str, int), f"{path}: questions[{number}]")): record
            for number, record in enumerate(need(content, "questions", list, str(path)))
        }
        for where, record in jsonl_records(file.path):
            key = str(need(record, "question_id", (str, int), where))
            if key not in known:
                raise DataError(f"{where}: question_id {key!r} is not in {path}")
            kind = need(known[key], "question_type_id", int, f"{path}: question_id {key}")
            if kind > 9:
                continue
            image = need(record, "image", str, where)
            yield Request(
                id=key,
                parts=image_first(inside(file.root, image, where), need(record, "text", str, where)),
                max_new_tokens=100,
                max_tiles=6,
                gold={
                    "set": "image",
                    "answer": need(known[key], "answer", str, str(path)),
                    "type": kind,
                },
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Share of answers whose first character is the letter."""
        values = []
        for row in rows:
            said = clean_choice(row.text, "ABCD") if mode == "clean" else row.text.strip()[:1]
            values.append(float(said == row.gold["answer"]))
        cells = group_cells(
            [(f"type {row.gold['type']}", value) for row, value in zip(rows, values, strict=True)]
        )
        return Score(
            mode=mode, metrics={"accuracy": mean(values)}, cells=cells, rows=row_scores(rows, values)
        )


def _is_given(value: str | None) -> bool:
    return bool(value) and value != "nan"


def _image(text: str, images: Mapping[str, bytes], where: str) -> bytes:
    """An image in base64, or the row that has it."""
    if len(text) <= 16 and text in images:
        return images[text]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: image is not base64 ({error})") from None
