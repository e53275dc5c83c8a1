"""One evaluation from beginning to end: every stride in turn, then scores, tables and pictures.

out/evaluation.json             what is evaluated; another evaluation in the same folder is refused
out/predictions_<stride>.jsonl  grows answer by answer; a restart continues it
out/cells.csv, table.txt, heatmap_<stride>.png, accuracy_by_length.png, loss.png    written at the end
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_v2pe.checkpoint.model_source import written_at
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.evaluation.retrieval import report
from megatron_v2pe.evaluation.retrieval.plain_questions import remarks
from megatron_v2pe.evaluation.retrieval.questions import (
    Answerer,
    Prediction,
    RetrievalItem,
    StrideSetting,
    answer_items,
    read_predictions,
    score,
)
from megatron_v2pe.inspection.run_curves import write_loss_curve

logger = logging.getLogger(__name__)
MANIFEST = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated, beside the strides; answers of different subjects never share a folder.

    Attributes:
        checkpoint: folder.
        checkpoint_written: time of its completion in nanoseconds since 1970.
        data: file of questions.
        data_digest: sha256 of its bytes.
        options: everything else that an answer depends on, as text.
    """

    checkpoint: str
    checkpoint_written: int
    data: str
    data_digest: str
    options: str


def describe_subject(checkpoint: str | Path, data: str | Path, *, options: str) -> Subject:
    """Identity of an evaluation, from files that exist."""
    return Subject(
        checkpoint=str(checkpoint),
        checkpoint_written=written_at(checkpoint),
        data=str(data),
        data_digest=hashlib.sha256(Path(data).read_bytes()).hexdigest(),
        options=options,
    )


def claim_folder(out: str | Path, subject: Subject, *, is_writer: bool = True) -> Path:
    """Make the folder, or continue in it when it belongs to the same subject.

    Args:
        out: the folder.
        subject: what is evaluated.
        is_writer: one process of several leaves the mark; all of them check it.

    Raises:
        ConfigError: it cannot be made, or holds another evaluation.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: {folder}: cannot be created ({error.strerror}); choose another folder"
        ) from None
    manifest = folder / MANIFEST
    wanted = asdict(subject)
    if manifest.exists():
        found = json.loads(manifest.read_text(encoding="utf-8"))
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            key = different[0]
            raise ConfigError(
                f"--out: {folder} holds an evaluation whose {key} is {found.get(key)!r}, not {wanted[key]!r}; "
                "choose another folder or remove this one"
            )
    if is_writer:
        write_atomic(manifest, json.dumps(wanted, indent=2) + "\n")
    return folder


def run_strides(
    items: Sequence[RetrievalItem],
    *,
    settings: Sequence[StrideSetting],
    answerer: Answerer,
    folder: Path,
    problems: Mapping[str, str] | None = None,
) -> dict[str, list[Prediction]]:
    """Answer everything with every stride that has no answer yet.

    Under torchrun every process calls this, and every replica of the model answers its share. All of them see the
    same open questions: nobody writes before `prepare` has brought everybody together, and all files are read before.

    Args:
        items: what is asked.
        settings: strides.
        answerer: the model; closed at the end.
        folder: where predictions are kept.
        problems: of items that cannot be asked, by id; they get a row with it.

    Returns:
        predictions by the stride's name, of all processes. Errors of an earlier start were tried again.
    """
    paths = {setting.name: folder / f"predictions_{setting.name}.jsonl" for setting in settings}
    done = {name: read_predictions(path, items) for name, path in paths.items()}
    with closing(answerer):
        for setting in settings:
            pending = [item for item in items if not _is_answered(item, done[setting.name])]
            if not pending:
                continue
            share = answerer.prepare(setting)
            # Assigned by length, so that all replicas get as many long documents.
            mine = sorted(pending, key=lambda item: item.length)[share.index :: share.count]
            with _progress(mine, setting, is_shown=share.is_writer and share.index == 0) as counter:
                answer_items(
                    mine,
                    setting=setting,
                    answerer=answerer,
                    predictions_path=paths[setting.name] if share.is_writer else None,
                    on_answer=counter,
                    problems=problems,
                )
    return {name: list(read_predictions(path, items).values()) for name, path in paths.items()}


def _is_answered(item: RetrievalItem, done: Mapping[str, Prediction]) -> bool:
    return item.item_id in done and not done[item.item_id].error


@contextmanager
def _progress(
    share: Sequence[RetrievalItem], setting: StrideSetting, *, is_shown: bool
) -> Iterator[_Counter]:
    """A bar on a terminal, and a line at the end for logs."""
    name = f"stride {setting.name}"
    with tqdm(total=len(share), desc=name, unit="answer", disable=None if is_shown else True) as bar:
        counter = _Counter(bar)
        yield counter
    logger.info("%s: %d of this process's %d answers right", name, counter.correct, len(share))


class _Counter:
    """Advances a progress bar and shows the share of right answers so far."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self.correct = 0
        self._count = 0

    def __call__(self, prediction: Prediction) -> None:
        self.correct += prediction.correct
        self._count += 1
        self._bar.set_postfix_str(f"length {prediction.length}, right {self.correct / self._count:.2f}")
        self._bar.update()


def write_evaluation(
    predictions: Mapping[str, Sequence[Prediction]],
    *,
    folder: Path,
    arch: InternVLArchitecture,
    metrics_path: str = "",
) -> str:
    """Write all tables and pictures; returns the table.

    Args:
        predictions: by the stride's name.
        folder: where to.
        arch: architecture of the checkpoint.
        metrics_path: a run's metrics.jsonl for the loss curve; empty draws none.
    """
    tokens_per_tile = arch.tokens_per_tile
    trained_length = arch.trained_length
    scores = {name: score(own) for name, own in predictions.items()}
    text = "\n".join([report.accuracy_table(scores, trained_length=trained_length), *remarks(predictions)])
    write_atomic(folder / "table.txt", text + "\n")
    write_atomic(folder / "cells.csv", report.cells_csv(scores))
    for name, cells in scores.items():
        report.write_heat_map(
            folder / f"heatmap_{name}.png",
            cells,
            stride=name,
            tokens_per_tile=tokens_per_tile,
            trained_length=trained_length,
        )
    report.write_accuracy_by_length(
        folder / "accuracy_by_length.png",
        scores,
        tokens_per_tile=tokens_per_tile,
        trained_length=trained_length,
    )
    if metrics_path:
        write_loss_curve(folder / "loss.png", metrics_path)
    return text
