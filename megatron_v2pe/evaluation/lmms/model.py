"""The model that lmms-eval sees: it records questions, replays rows, or answers in this process.

    --model_args record=Q                writes the questions to Q and answers nothing
    --model_args rows=O,stride=S         answers from rows of  evaluate --benchmark lmms --data-dir Q --out O
    HarnessModel(answer=...)             answers in process; see `launch.py`

Whatever ranks there are belong to the model: lmms-eval shards documents by RANK, which a question answered by several
ranks together cannot bear, so it never sees them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.evaluation.benchmarks.base import Request, Response
from megatron_v2pe.evaluation.benchmarks.harness_questions import QUESTIONS, question, record
from megatron_v2pe.evaluation.jobs.identity import question_digest, read_manifest
from megatron_v2pe.evaluation.jobs.media_digests import MediaDigests
from megatron_v2pe.evaluation.jobs.response_rows import read_rows


class HarnessModel(lmms):
    """A chat model of lmms-eval; exactly one of the first three arguments is given.

    Args:
        rows: folder of rows to replay.
        record: folder to record questions in.
        answer: answers a request.
        stride: of the rows; may be omitted where the folder has one.
        batch_size: lmms-eval's; questions are answered one by one.
        device: lmms-eval's; not used.

    Raises:
        ConfigError: none or several of the three, or a folder that does not fit.
    """

    is_simple = False

    def __init__(
        self,
        rows: str = "",
        record: str = "",
        answer: Callable[[Request], Response] | None = None,
        stride: str | int = "",
        batch_size: int = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if bool(rows) + bool(record) + (answer is not None) != 1:
            raise ConfigError("--model_args: give one of  record=FOLDER  and  rows=FOLDER")
        self._answer = answer
        self._record = Path(record) if record else None
        if self._record is not None and (self._record / QUESTIONS).exists():
            raise ConfigError(
                f"--model_args: {record} holds recorded questions already; choose another folder"
            )
        self._rows = _Replay(Path(rows), str(stride)) if rows else None
        self._folder: Any = tempfile.TemporaryDirectory(prefix="v2pe-lmms-")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            DataError: a row is missing, belongs to another question, or is an error.
        """
        return [self._one(request) for request in requests]

    def _one(self, instance: Any) -> str:
        _, to_messages, options, doc_id, task, split = instance.args
        name = f"{task}/{split}/{doc_id}"
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id]))
        folder = self._record or Path(self._folder.name)
        asked = question(name, messages, options, folder=folder)
        if self._record is not None:
            record(asked, self._record)
            return ""
        response = self._rows.of(asked) if self._rows is not None else self._answered(asked)
        if response.error is not None:
            raise DataError(
                f"{name}: ended with an error: {response.error}; evaluate again with --retry-errors"
            )
        return response.text

    def _answered(self, asked: Request) -> Response:
        assert self._answer is not None
        return self._answer(asked)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("tasks that compare likelihoods are not supported; choose a generate_until task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("tasks of several rounds are not supported; choose a generate_until task")


class _Replay:
    """Rows of a folder by id, each held against the question that is asked now."""

    def __init__(self, folder: Path, stride: str) -> None:
        strides = read_manifest(folder)["strides"]
        if stride and stride not in strides:
            raise ConfigError(f"--model_args: {folder} has rows of stride {', '.join(strides)}, not {stride}")
        if not stride and len(strides) > 1:
            raise ConfigError(
                f"--model_args: {folder} has several strides; add stride= one of {', '.join(strides)}"
            )
        self._folder, self._stride = folder, stride or strides[0]
        self._rows = read_rows(folder, self._stride)
        self._digests = MediaDigests()

    def of(self, asked: Request) -> Response:
        row = self._rows.get(asked.id)
        if row is None:
            raise DataError(
                f"{self._folder}: has no answer to {asked.id!r} with stride {self._stride}; record the questions of "
                "this task and evaluate them first"
            )
        is_same = question_digest(asked) == row.question and (
            not row.media or self._digests.of(asked) == row.media
        )
        if not is_same:
            raise DataError(
                f"{row.where}: answers another question than {asked.id!r} is now; record and evaluate again"
            )
        return row.response
