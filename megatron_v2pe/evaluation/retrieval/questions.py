"""Retrieval over lengths, depths and strides: what is asked, what was answered, what was right.

    eval.jsonl -> RetrievalItem --answerer(item, stride)--> predictions_<stride>.jsonl -> Cell(length, depth)

An answer is appended to its file the moment it exists, so that a killed evaluation continues where it stopped
(`runner.py`), and scores can be computed again from the files alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.jsonl import append_json, read_jsonl
from megatron_v2pe.data.index.scan import check_kind
from megatron_v2pe.data.media.medium import plain_text
from megatron_v2pe.data.samples.formats import SYSTEM_NOTE, note_text
from megatron_v2pe.data.samples.records import Record, parse_record
from megatron_v2pe.data.sources.meta import DatasetEntry, read_meta

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StrideSetting:
    """How visual tokens advance positions while answering.

    Attributes:
        name: as the user wrote it: `default` or a number of position units.
        mode: position mode of that name.
        stride: position units of 1/tokens_per_tile; tokens_per_tile itself for `default`.
    """

    name: str
    mode: Literal["default", "v2pe_fixed"]
    stride: int


@dataclass(frozen=True, kw_only=True)
class RetrievalItem:
    """One question about a long document.

    Attributes:
        item_id: `id` of the record, unique within the evaluation.
        record: conversation that ends with the question; the expected answer is not in it.
        entry: its data set, whose limits of tiles and frames count.
        answer: expected answer, compared exactly after blanks at both ends are dropped.
        length: nominal length in tokens, a row of the report; 0 for a plain question, as training data hold them.
        depth: nominal place of the needle, 0 (first) .. 1 (last), a column of the report.
    """

    item_id: str
    record: Record
    entry: DatasetEntry
    answer: str
    length: int
    depth: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for a question.

    Attributes:
        text: the answer.
        is_cut: it reached the longest answer, and may have had more to say.
        error: why there is none.
    """

    text: str = ""
    is_cut: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answered item; a line of the predictions file. A question that could not be asked has an error."""

    id: str
    length: int
    depth: float
    answer: str
    prediction: str
    correct: bool
    cut: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Score of one length at one depth: `correct` of `count` answers."""

    length: int
    depth: float
    correct: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.count


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of the open questions a process answers.

    Attributes:
        index: its model replica, 0..count-1.
        count: replicas that share the questions.
        is_writer: one process of a replica writes the answers of all of it.
    """

    index: int = 0
    count: int = 1
    is_writer: bool = True


class Answerer(Protocol):
    """Whatever can answer: a model, or a substitute in tests.

    `prepare` and `close` are collective when several processes evaluate together: all must call them alike.
    """

    def prepare(self, setting: StrideSetting) -> Share:
        """Get ready for questions with this setting; returns this process's share of them."""

    def answer(self, item: RetrievalItem, setting: StrideSetting) -> Answer:
        """The greedy answer; `prepare` was called for the setting."""

    def close(self) -> None:
        """Wait until every process has answered, and release the model."""


def parse_strides(text: str, *, tokens_per_tile: int) -> list[StrideSetting]:
    """Read `default,1,2`.

    Raises:
        ConfigError: an entry that is neither `default` nor a number in 1..tokens_per_tile, or a repetition.
    """
    settings = []
    for name in (part.strip() for part in text.split(",")):
        if name == "default":
            settings.append(StrideSetting(name=name, mode="default", stride=tokens_per_tile))
        elif name.isdecimal() and 1 <= int(name) <= tokens_per_tile:
            settings.append(StrideSetting(name=str(int(name)), mode="v2pe_fixed", stride=int(name)))
        else:
            raise ConfigError(
                f"--strides: {name!r} in {text!r} is neither 'default' nor a number in 1..{tokens_per_tile}; this "
                f"checkpoint has {tokens_per_tile} visual tokens per tile"
            )
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ConfigError(f"--strides: {text!r} names a stride twice; name each once")
    return settings


def read_items(path: str | Path, *, root: str = "") -> list[RetrievalItem]:
    """Items of a jsonl file, or of all files of a meta json.

    Args:
        path: the file.
        root: folder of the images of a jsonl file; empty is the folder of the file. A meta json has its own.

    Raises:
        ConfigError: a root for a meta json, or one that is no folder.
        DataError: a file or line cannot be used, two records share an id, or there is no record.
    """
    items: list[RetrievalItem] = []
    places: dict[str, str] = {}
    for entry in _entries(Path(path), root):
        check_kind(entry.annotation)
        for number, values in read_jsonl(entry.annotation):
            item = _parse_item(values, entry, f"{entry.annotation}:{number}", number)
            if item.item_id in places and not item.length:  # training data may repeat ids
                item = replace(item, item_id=f"{item.item_id} ({entry.name}:{number})")
            if item.item_id in places:
                raise DataError(
                    f"{item.record.where}: id {item.item_id!r} was used at {places[item.item_id]} already; "
                    "ids must be unique, they say which records have been answered"
                )
            places[item.item_id] = item.record.where
            items.append(item)
    if not items:
        raise DataError(f"{path}: holds no record to evaluate")
    _log_notes(items)
    if len({item.length > 0 for item in items}) > 1:
        plain = next(item for item in items if not item.length)
        raise DataError(
            f"{plain.record.where}: has no length and depth, which other records have; evaluate plain questions and "
            "retrieval in files of their own"
        )
    return items


def _log_notes(items: Sequence[RetrievalItem]) -> None:
    """Say once, with the first place, what of the records is not read, or read under another name."""
    found: dict[str, tuple[int, str]] = {}
    for item in items:
        for note in item.record.notes:
            kind = f"{SYSTEM_NOTE}their own" if note.startswith(SYSTEM_NOTE) else note
            count, first = found.get(kind, (0, item.record.where))
            found[kind] = (count + 1, first)
    for note, (count, first) in sorted(found.items()):
        level = logging.WARNING if note.startswith("unread:") else logging.INFO
        logger.log(level, "%s", note_text(note, count, first))


def _entries(path: Path, root: str) -> tuple[DatasetEntry, ...]:
    if root and not Path(root).is_dir():
        raise ConfigError(f"--root is {root!r}, which is no folder; name the folder of the images")
    if path.suffix == ".json":
        if root:
            raise ConfigError(
                f"--root is given, but {path} is a meta json, which has a root for each data set"
            )
        return read_meta(path)
    beside = DatasetEntry(
        name=path.stem,
        annotation=str(path),
        root=root or str(path.parent),
    )
    return (beside,)


def _parse_item(values: dict[str, Any], entry: DatasetEntry, where: str, number: int) -> RetrievalItem:
    """Check one record and separate its expected answer from the conversation.

    A record without length and depth is a plain question; its line number is its id where it has none.
    """
    is_plain = values.get("length") is None and values.get("depth") is None
    if is_plain:
        own = values.get("id")
        own = f"{entry.name}:{number}" if own is None or isinstance(own, (list, dict)) else str(own)
        values = {**values, "length": 0, "depth": 0.0, "id": own}
    for key, kinds in (("id", (str, int)), ("length", (int,)), ("depth", (int, float))):
        value = values.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise DataError(
                f"{where}: {key} is {value!r}; a retrieval record needs an id, its length in tokens and the "
                "needle's depth in 0..1; a plain question has neither length nor depth"
            )
    if not is_plain and values["length"] < 1:
        raise DataError(f"{where}: length is {values['length']}, but must be a number of tokens")
    if not 0 <= values["depth"] <= 1:
        raise DataError(f"{where}: depth is {values['depth']}, but must lie in 0..1")
    record = parse_record(values, entry=entry, sample_id=f"{entry.name}:{number}", where=where)
    if record.turns[-1].role != "gpt" or not record.turns[-1].value.strip():
        raise DataError(f"{where}: the conversation must end with the expected answer ('gpt')")
    question = replace(record, turns=record.turns[:-1])
    return RetrievalItem(
        item_id=str(values["id"]),
        record=question,
        entry=entry,
        answer=plain_text(record.turns[-1].value.strip()),
        length=values["length"],
        depth=float(values["depth"]),
    )


def answer_items(
    items: Sequence[RetrievalItem],
    *,
    setting: StrideSetting,
    answerer: Answerer,
    predictions_path: str | Path | None,
    on_answer: Callable[[Prediction], None],
    problems: Mapping[str, str] | None = None,
) -> None:
    """Answer items, shortest first, and append each answer to the file (if any) as soon as it exists.

    Several processes may append to one file: a line is a single write. Items with a problem, by their id, are not
    asked: it is their error.
    """
    for item in sorted(items, key=lambda item: item.length):
        problem = (problems or {}).get(item.item_id)
        given = Answer(error=problem) if problem else answerer.answer(item, setting)
        text = given.text.strip()
        prediction = Prediction(
            id=item.item_id,
            length=item.length,
            depth=item.depth,
            answer=item.answer,
            prediction=text,
            correct=not given.error and text == item.answer,
            cut=given.is_cut and text != item.answer,
            error=given.error,
        )
        if predictions_path is not None:
            append_json(predictions_path, asdict(prediction))
        on_answer(prediction)


def read_predictions(path: str | Path, items: Sequence[RetrievalItem]) -> dict[str, Prediction]:
    """Predictions of a file by id, none if it does not exist.

    Raises:
        DataError: a line is no prediction, or answers something that is not among `items`.
    """
    if not Path(path).exists():
        return {}
    known = {item.item_id: item for item in items}
    done: dict[str, Prediction] = {}
    for number, values in read_jsonl(path):
        try:
            prediction = Prediction(**values)
        except TypeError as error:
            raise DataError(f"{path}:{number}: not a prediction ({error}); remove the file") from None
        item = known.get(prediction.id)
        if item is None or (item.answer, item.length) != (prediction.answer, prediction.length):
            raise DataError(
                f"{path}:{number}: answers {prediction.id!r}, which is not in this data; choose another --out or "
                "remove the file"
            )
        done[prediction.id] = prediction
    return done


def score(predictions: Iterable[Prediction]) -> list[Cell]:
    """Right answers of each length and depth, ordered by both."""
    counts: dict[tuple[int, float], list[int]] = {}
    for prediction in predictions:
        cell = counts.setdefault((prediction.length, prediction.depth), [0, 0])
        cell[0] += prediction.correct
        cell[1] += 1
    return [
        Cell(length=length, depth=depth, correct=correct, count=count)
        for (length, depth), (correct, count) in sorted(counts.items())
    ]


def by_length(cells: Iterable[Cell]) -> dict[int, Cell]:
    """All depths of a length together; each answer counts once."""
    sums: dict[int, list[int]] = {}
    for cell in cells:
        total = sums.setdefault(cell.length, [0, 0])
        total[0] += cell.correct
        total[1] += cell.count
    return {
        length: Cell(length=length, depth=-1.0, correct=correct, count=count)
        for length, (correct, count) in sorted(sums.items())
    }
