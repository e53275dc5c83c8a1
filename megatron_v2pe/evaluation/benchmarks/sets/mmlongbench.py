"""MMLongBench (Wang et al., 2025): 17 of its 19 sets at 8K to 128K tokens, an outside judge of V2PE.

    DATA/mmlb_data/NIAH/retrieval-text_test_K8_dep6.jsonl, DATA/mmlb_data/vrag/infoseek_K8_dep3.jsonl,
    DATA/mmlb_data/ICL/cars196_K8.json, DATA/mmlb_data/documentQA/slidevqa_K8.jsonl, ...
    DATA/mmlb_image/...

Its authors ran V2PE-256K at strides 16, 64 and 256, on 100 questions of a set. Summaries are missing: their published
number is a verdict of GPT-4o. The examples of many-shot ICL are drawn from the published lists by question, because the
published drawing depends on Python's global random state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
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
from megatron_v2pe.evaluation.benchmarks.files import inside, json_file, jsonl_records, need
from megatron_v2pe.evaluation.metrics.long_documents import METRICS

LENGTHS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class _Set:
    """A set: file below mmlb_data, metric, and the part of its category's mean that it belongs to."""

    file: str
    metric: str
    category: str
    part: str = ""


SETS = {
    "retrieval-text": _Set("NIAH/retrieval-text_test_K{}_dep6.jsonl", "contains", "NIAH", "retrieval"),
    "counting-text": _Set("NIAH/counting-text_test_K{}_dep3.jsonl", "sum", "NIAH", "counting"),
    "reasoning-text": _Set("NIAH/reasoning-text_test_K{}_dep3.jsonl", "contains", "NIAH", "reasoning"),
    "retrieval-image": _Set("NIAH/retrieval-image_test_K{}_dep6.jsonl", "letter", "NIAH", "retrieval"),
    "counting-image": _Set("NIAH/counting-image_test_K{}_dep3.jsonl", "sum", "NIAH", "counting"),
    "reasoning-image": _Set("NIAH/reasoning-image_test_K{}_dep6.jsonl", "letter", "NIAH", "reasoning"),
    "vh_single": _Set("NIAH/vh_single_test_1000_K{}_dep6.jsonl", "yes", "NIAH"),
    "vh_multi": _Set("NIAH/vh_multi_test_1000_K{}_dep3.jsonl", "yes", "NIAH"),
    "infoseek": _Set("vrag/infoseek_K{}_dep3.jsonl", "contains", "VRAG"),
    "viquae": _Set("vrag/viquae_K{}_dep6.jsonl", "contains", "VRAG"),
    "cars196": _Set("ICL/cars196_K{}.json", "class", "ICL"),
    "food101": _Set("ICL/food101_K{}.json", "class", "ICL"),
    "inat2021": _Set("ICL/inat2021_K{}.json", "class", "ICL"),
    "sun397": _Set("ICL/sun397_K{}.json", "class", "ICL"),
    "longdocurl": _Set("documentQA/longdocurl_K{}.jsonl", "document", "DocVQA"),
    "mmlongdoc": _Set("documentQA/mmlongdoc_K{}.jsonl", "document", "DocVQA"),
    "slidevqa": _Set("documentQA/slidevqa_K{}.jsonl", "document", "DocVQA"),
}
_BY_JUDGE = "the published number of summaries is a verdict of GPT-4o, which no program computes"
_FORMAT = "Write your answer in the following format:\nAnswer: [answer]\n\n"
_NEEDLE = (
    "You are given interleaved text and images. Please answer the question{} based on the given text and images. "
    + _FORMAT
)
_HAYSTACK = (
    "You are given a set of images. Please answer the question in Yes or No based on the given images. "
    + _FORMAT
)
_RAG = (
    "Use the given documents to write a concise and short answer to the question about the entity shown in the "
    "image. " + _FORMAT
)
_DOCUMENT = (
    "You are given a document with text and images, and a question. Answer the question as concisely as you can, using "
    "a single phrase or sentence if possible. If the question cannot be answered based on the information in the "
    "article, write 'Not answerable.' " + _FORMAT
)
_EXAMPLES = (
    "You need to recognize entities in images. Use the provided mapping from the image to label to assign a label to "
    'the test image. Only output "label: {label}" and nothing else.\n\nTraining examples:\n'
)
# What an answer without yes or no counts as: the published cycle over the questions of a file.
_DEFAULTS = (0, 1, 1, 0)


class MMLongBench(Benchmark):
    """Needles, visual haystacks, visual RAG, many-shot ICL and documents, at five lengths."""

    name = "mmlongbench"
    title = "MMLongBench (without summaries)"
    metric = (
        "substring, letter, sum of the list, class, yes or no, F1 or number of documents (Wang et al. 2025)"
    )
    modes: tuple[Mode, ...] = ("original", "clean")
    download = (
        "ZhaoweiWang/MMLongBench of Hugging Face: 0_mmlb_data.tar.gz and the images of vrag, vh, mm-niah, icl and "
        "docqa, into DATA/"
    )
    unscored = MappingProxyType({"gov-report": _BY_JUDGE, "multi-lexsum": _BY_JUDGE})

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a set and length."""
        return [
            DataFile(
                set=f"{name}@{length}k",
                path=data_dir / "mmlb_data" / each.file.format(length),
                root=data_dir / "mmlb_image",
            )
            for length in LENGTHS
            for name, each in SETS.items()
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        name, _, length = file.set.partition("@")
        for number, (where, record) in enumerate(_records(name, file.path)):
            text, images = _prompt(name, record, where)
            try:
                parts = interleave(text, [inside(file.root, image, where) for image in images])
            except ValueError as error:
                raise DataError(f"{where}: image_list: {error}") from None
            depth = record.get("depth")
            gold = {
                "set": name,
                "length": int(length.rstrip("k")),
                "answer": need(record, "answer", (str, int, float, list), where),
                "depth": depth if isinstance(depth, (int, float)) else None,
            }
            if SETS[name].metric == "document":
                gold["kind"] = need(record, "answer_format", str, where)
            if SETS[name].metric == "yes":
                gold["default"] = _DEFAULTS[number % len(_DEFAULTS)]
            yield Request(
                id=f"{file.set}/{number}-{record.get('id', number)}",
                parts=parts,
                max_new_tokens=128,
                max_tiles=12,
                gold=gold,
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Mean over lengths of each set and category; at each length a category is the mean of its parts, as published.

        NIAH has five parts: the two visual haystacks, and retrieval, counting and reasoning, each the mean of text and
        image. Sets that were not asked are left out and named.
        """
        values = [_value(row, mode) for row in rows]
        sums: dict[tuple[str, int], list[float]] = {}
        for row, value in zip(rows, values, strict=True):
            sums.setdefault((row.gold["set"], row.gold["length"]), []).append(value)
        cells = tuple(
            ScoreCell(group=name, length=length, total=sum(found), count=len(found))
            for (name, length), found in sums.items()
        )
        lengths = sorted({length for _, length in sums})
        names = [name for name in SETS if any(cell.group == name for cell in cells)]
        categories = list(dict.fromkeys(SETS[name].category for name in names))
        at = {(cell.group, cell.length): cell.mean for cell in cells}
        metrics = {
            category: mean([v for n in lengths if (v := _category(at, category, n)) is not None])
            for category in categories
        }
        metrics |= {f"{n}K": mean([cell.mean for cell in cells if cell.length == n]) for n in lengths}
        metrics |= {name: mean([cell.mean for cell in cells if cell.group == name]) for name in names}
        notes = [f"without the sets {', '.join(self.unscored)}: {_BY_JUDGE}"]
        missing = [n for n, each in SETS.items() if n not in names and each.category in categories]
        if missing:
            notes.append(f"without the sets {', '.join(missing)}, which were not asked")
        return Score(
            mode=mode,
            metrics=metrics,
            cells=cells,
            rows=row_scores(rows, values),
            lengths=tuple(lengths),
            by_length={name: [at.get((name, n), float("nan")) for n in lengths] for name in names},
            notes=tuple(notes),
        )


def _category(at: Mapping[tuple[str, int | None], float], category: str, length: int) -> float | None:
    """Mean over the parts of a category at one length; None where it has no set there."""
    parts: dict[str, list[float]] = {}
    for name, each in SETS.items():
        if each.category == category and (name, length) in at:
            parts.setdefault(each.part or name, []).append(at[name, length])
    return mean([mean(part) for part in parts.values()]) if parts else None


def _records(name: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of a file; questions of many-shot ICL get the examples of their domain."""
    if SETS[name].category != "ICL":
        yield from jsonl_records(path)
        return
    content = json_file(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must be an object of domains, found {type(content).__name__}")
    for domain, both in content.items():
        where = f"{path}: {domain}"
        lists = need(both, "exemplar_list", list, where)
        for number, record in enumerate(need(both, "test_example", list, where)):
            yield (
                f"{where}: test_example {number}",
                {**record, "examples": _draw(lists, f"{domain}/{number}")},
            )


def _draw(lists: Sequence[Sequence[Sequence[Any]]], seed: str) -> list[Any]:
    """Examples of one question: one of the lists, each of its rounds shuffled."""
    generator = random.Random(seed)
    rounds = generator.choice(lists)
    return [example for each in rounds for example in generator.sample(each, len(each))]


def _prompt(name: str, record: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """Text with `<image>` placeholders, and files of the images."""
    category = SETS[name].category
    if category == "ICL":
        return _examples_prompt(record, where)
    question = need(record, "question", str, where)
    if category == "DocVQA":
        pages = need(record, "page_list", list, where)
        context = "\n\n".join(f"Document {Path(page).parent.name[:15]}: <image>" for page in pages)
        about = need(record, "doc_name", str, where)[:15]
        question = f"Based on Document {about}, answer the following question. {question}"
        return _asked(_DOCUMENT, context, question), pages
    documents = need(record, "ctxs", list, where)
    if category == "VRAG":
        context = "\n\n".join(
            f"Document (Title: {need(d, 'title', str, where)}): {need(d, 'text', str, where)}"
            for d in documents
        )
        return _asked(_RAG, context, f"<image>{question}"), [need(record, "image", str, where)]
    if SETS[name].metric == "yes":
        return _asked(_HAYSTACK, "\n".join(["<image>"] * len(documents)), question), documents
    return _needle_prompt(name, record, question, where)


def _needle_prompt(name: str, record: Mapping[str, Any], question: str, where: str) -> tuple[str, list[str]]:
    context = "\n\n".join(
        need(document, "text", str, where) for document in need(record, "ctxs", list, where)
    )
    images = list(need(record, "image_list", list, where))
    option = ""
    if SETS[name].metric == "letter":
        option = " with the option's letter (A, B, etc.)"
        choices = need(record, "choices_image", list, where)
        question += "".join(f"\n{chr(65 + index)}. <image>" for index in range(len(choices)))
        images += choices
    elif name == "counting-image":
        images += need(record, "needle_image_list", list, where)
    return _asked(_NEEDLE.format(option), context, question), images


def _examples_prompt(record: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    examples = need(record, "examples", list, where)
    context = "\n\n".join(f"<image>\nlabel: {need(each, 'id', (int, str), where)}" for each in examples)
    images = [need(each, "image", str, where) for each in (*examples, record)]
    return f"{_EXAMPLES}{context}\n\nNow classify this image: <image>\nlabel:", images


def _asked(instruction: str, context: str, question: str) -> str:
    return f"{instruction}{context}\n\nQuestion: {question}\nAnswer:"


def _value(row: Row, mode: Mode) -> float:
    """Score of an answer.

    `original`: the prompt's last word (`Answer:`, `label:`) is put before the answer, and the better counts of that
    text and of what follows the word in it; of documents the latter alone. `clean`: what follows the last such word of
    the answer itself, and where it says neither yes nor no it is wrong.
    """
    each, gold = SETS[row.gold["set"]], row.gold
    metric = METRICS[each.metric]
    word = "label:" if each.category == "ICL" else "Answer:"
    more = {"kind": gold["kind"]} if each.metric == "document" else {}
    if mode == "clean":
        said = re.split(re.escape(word), row.text, flags=re.IGNORECASE)[-1].strip()
        is_read_as_it_is = each.metric in ("contains", "document")
        return metric(said if is_read_as_it_is else f"{word} {said}", gold["answer"], **more) if said else 0.0
    after = re.sub(rf"^{re.escape(word)}", "", row.text.strip(), flags=re.IGNORECASE).strip()
    whole = word + row.text
    if each.metric == "yes":
        return metric(whole, gold["answer"], default=gold["default"])
    texts = [after] if each.metric == "document" else [whole, after]
    return max(metric(text, gold["answer"], **more) for text in texts)
