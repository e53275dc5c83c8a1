"""MileBench (Song et al., 2024): 29 sets of many images, in groups T (temporal), S (semantic), NI (needles, retrieval).

    DATA/ActionSequence/ActionSequence.json     DATA/ActionSequence/images/...

Prompts and settings: `V2PE:eval/milebench/eval_milebench.py` (one tile an image, the option's letter, 32 new tokens).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.evaluation.benchmarks.base import (
    Benchmark,
    DataFile,
    Mode,
    Request,
    Response,
    Row,
    Score,
    group_cells,
    interleave,
    mean,
    row_scores,
)
from megatron_v2pe.evaluation.benchmarks.files import (
    first_existing,
    inside,
    json_file,
    json_list,
    jsonl_records,
    need,
)
from megatron_v2pe.evaluation.metrics.letters import (
    LETTER_RULES,
    LetterRule,
    clean_choice,
    letter_of,
    milebench_choice,
    milebench_text,
)
from megatron_v2pe.evaluation.metrics.overlap import rouge_l
from megatron_v2pe.evaluation.metrics.vqa_text import listed

TEMPORAL = listed(
    """ActionLocalization ActionPrediction ActionSequence CharacterOrder CounterfactualInference EgocentricNavigation
MovingAttribute MovingDirection ObjectExistence ObjectInteraction ObjectShuffle SceneTransition StateChange"""
)
SEMANTIC = listed(
    """ALFRED CLEVR-Change DocVQA IEdit MMCoQA MultiModalQA nuscenes OCR-VQA SlideVQA Spot-the-Diff TQA WebQA WikiVQA"""
)
NEEDLES = ["TextNeedleInAHaystack", "ImageNeedleInAHaystack", "GPR1200"]
GROUPS = {"T": TEMPORAL, "S": SEMANTIC, "NI": NEEDLES}
_COUNTS = {"GPR1200": 600, "TextNeedleInAHaystack": 320, "ImageNeedleInAHaystack": 320}
_LETTER_PROMPT = "\nAnswer with the option's letter from the given choices directly."
_PLACE = re.compile(r"\{(?:image|table)#\d+\}")


class MileBench(Benchmark):
    """29 sets of 200 to 600 questions about 2 to 109 images.

    Args:
        letters: which of the published rules reads a letter out of an answer; see `letters.milebench_choice`.
    """

    name = "milebench"
    title = "MileBench"
    metric = "accuracy; ROUGE-L F of open answers (Song et al. 2024)"
    download = "FreedomIntelligence/MileBench of Hugging Face: each set's folder (SET/SET.json, SET/images) into DATA/"

    def __init__(self, letters: LetterRule = "release") -> None:
        self.letters = letters

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file a set."""
        return [
            DataFile(
                set=name,
                path=data_dir / name / f"{name}.json",
                root=data_dir / name / "images",
                published=_COUNTS.get(name, 200),
            )
            for name in (*TEMPORAL, *SEMANTIC, *NEEDLES)
        ]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        content = json_file(file.path)
        where = str(file.path)
        if not isinstance(content, dict):
            raise DataError(f"{where}: must be an object with meta_data and data")
        instructions = need(content, "meta_data.task_instruction", (list, dict), where)
        kind = need(content, "meta_data.question_type", str, where)
        for number, record in enumerate(need(content, "data", list, where)):
            yield _request(record, file, kind, instructions, f"{where}: data[{number}]")

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Mean of each set; T, S and NI are means over their sets, Avg the mean of the three."""
        scored = [(row.gold["set"], self._value(row, mode)) for row in rows]
        cells = group_cells(scored)
        sets = {cell.group: cell.mean for cell in cells}
        metrics: dict[str, float] = {}
        notes = [f"letter rule {self.letters!r}"] if mode == "release" else []
        for name, members in GROUPS.items():
            found = [sets[member] for member in members if member in sets]
            if found:
                metrics[name] = mean(found)
            if 0 < len(found) < len(members):
                notes.append(f"{name} is the mean of {len(found)} sets of {len(members)}")
        if len(metrics) == len(GROUPS):
            metrics = {"Avg": mean(list(metrics.values())), **metrics}
        return Score(
            mode=mode,
            metrics=metrics | sets,
            cells=cells,
            rows=row_scores(rows, [value for _, value in scored]),
            notes=tuple(notes),
        )

    def _value(self, row: Row, mode: Mode) -> float:
        name, answer = row.gold["set"], milebench_text(row.gold["answer"])
        said = milebench_text(row.text)
        if mode == "clean" and not said:
            return 0.0
        if "NeedleInAHaystack" in name:
            return float(answer in said.split())
        if name == "MMCoQA":
            return float(answer in said)
        choices = row.gold.get("choices")
        if choices is None:
            return rouge_l(said, answer)
        options = [milebench_text(choice) for choice in choices]
        if mode == "clean":
            found = _clean_option(row.text, said, options)
        else:
            found = milebench_choice(said, options, rule=self.letters)
        return float(found == letter_of(options.index(answer)))

    def recorded(self, path: Path) -> list[Row] | None:
        """Rows of `SET.jsonl`, or of the release's `SET/pred_with_extracted.json` and `SET/pred.json`."""
        rows = []
        for name in (*TEMPORAL, *SEMANTIC, *NEEDLES):
            flat = path if path.name == f"{name}.jsonl" else path / f"{name}.jsonl"
            nested = next(
                (
                    p
                    for stem in ("pred_with_extracted", "pred")
                    if (p := path / name / f"{stem}.json").exists()
                ),
                None,
            )
            if flat.is_file():
                rows += [_recorded_row(record, name, where) for where, record in jsonl_records(flat)]
            elif nested is not None:
                rows += [_recorded_row(record, name, where) for where, record in json_list(nested)]
        return rows or None

    def compared(self, path: Path, rows: Sequence[Row], mode: Mode) -> list[str]:
        """How many of the values in `SET.eval.json` (or `SET/eval.json`) each letter rule reproduces to 1e-9."""
        folder = path if path.is_dir() else path.parent
        recorded: dict[str, float] = {}
        for name in {row.gold["set"] for row in rows}:
            file = first_existing(folder / f"{name}.eval.json", folder / name / "eval.json")
            if file.exists():
                recorded[name] = float(next(iter(json_file(file).values())))
        lines = []
        for rule in LETTER_RULES if recorded else ():
            ours = MileBench(rule).score(rows, "release").metrics
            other = sorted(name for name, value in recorded.items() if abs(ours[name] - value) > 1e-9)
            shown = [f"{name} {100 * recorded[name]:.2f}, here {100 * ours[name]:.2f}" for name in other[:3]]
            more = f" (not {'; '.join(shown)}{', ...' if len(other) > 3 else ''})" if other else ""
            agreed = len(recorded) - len(other)
            lines.append(f"letter rule {rule!r} gives {agreed} of {len(recorded)} recorded values{more}")
        return lines


def _request(record: Mapping[str, Any], file: DataFile, kind: str, instructions: Any, where: str) -> Request:
    instance = need(record, "task_instance", dict, where)
    number = need(record, "task_instruction_id", (int, str), where)
    try:
        instruction = instructions[number if isinstance(instructions, list) else str(number)]
    except (IndexError, KeyError, TypeError):
        raise DataError(
            f"{where}: task_instruction_id is {number!r}, which meta_data does not have"
        ) from None
    context = need(instance, "context", str, where)
    choices = None
    if kind == "multi-choice":
        choices = need(instance, "choice_list", list, where)
        letters = [""] * len(choices)
        if file.set != "GPR1200":
            letters = [f"{letter_of(index)}. " for index in range(len(choices))]
        lines = [f"{letter}{choice}" for letter, choice in zip(letters, choices, strict=True)]
        context += "\nChoice list: \n" + "\n".join(lines) + _LETTER_PROMPT
    question = _PLACE.sub("<image>", f"{instruction}\n{context}")
    images = [inside(file.root, name, where) for name in need(instance, "images_path", list, where)]
    try:
        parts = interleave(question, images)
    except ValueError as error:
        raise DataError(f"{where}: images_path: {error}") from None
    return Request(
        id=f"{file.set}/{need(record, 'sample_id', (int, str), where)}",
        parts=parts,
        max_new_tokens=32,
        max_tiles=1,
        gold={
            "set": file.set,
            "answer": need(record, "response", str, where),
            "choices": choices,
            "images": len(images),
        },
    )


def _recorded_row(record: Mapping[str, Any], name: str, where: str) -> Row:
    identity = f"{name}/{need(record, 'sample_id', (int, str), where)}"
    return Row(
        response=Response(id=identity, text=need(record, "pred_response", str, where)),
        gold={
            "set": name,
            "answer": need(record, "gt_response", str, where),
            "choices": record.get("choice_list"),
        },
    )


def _clean_option(text: str, said: str, options: Sequence[str]) -> str:
    """The letter that an answer begins with, or the one option whose text it is."""
    letters = [letter_of(index) for index in range(len(options))]
    found = clean_choice(text, letters)
    return found or (letters[options.index(said)] if said in options else "")
