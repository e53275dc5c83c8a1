"""A harness's questions as requests: messages -> parts, images -> files named by their content.

QUESTIONS/questions.jsonl, QUESTIONS/images/...     answered by  evaluate --benchmark lmms --data-dir QUESTIONS
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.evaluation.benchmarks.base import Benchmark, DataFile, Mode, Part, Request, Row, Score
from megatron_v2pe.evaluation.benchmarks.files import inside, jsonl_records, need

QUESTIONS = "questions.jsonl"
IMAGES = "images"
FRAMES = 16
_MAX_TILES = 12


class HarnessQuestions(Benchmark):
    """Questions that a harness asked while it recorded; the harness scores their answers."""

    name = "lmms"
    title = "recorded questions of lmms-eval"
    metric = "lmms-eval's own, by --model_args rows=O"
    modes: tuple[Mode, ...] = ("clean",)
    download = "lmms_eval --model megatron_v2pe --model_args record=DATA --tasks ... writes it"

    def files(self, data_dir: Path) -> list[DataFile]:
        """One file of all tasks."""
        return [DataFile(set="all", path=data_dir / QUESTIONS, root=data_dir)]

    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """See `Benchmark`."""
        for where, record in jsonl_records(file.path):
            parts = []
            for values in need(record, "parts", list, where):
                try:
                    part = Part(**values)
                except TypeError as error:
                    raise DataError(f"{where}: not a recorded question ({error})") from None
                if part.kind == "image":  # recorded relative to the folder, so that it can be moved
                    part = Part(**{**values, "path": inside(file.root, part.path, where)})
                parts.append(part)
            yield Request(
                id=need(record, "id", str, where),
                parts=tuple(parts),
                max_new_tokens=need(record, "max_new_tokens", int, where),
                max_tiles=need(record, "max_tiles", int, where),
                stop=tuple(need(record, "stop", list, where)),
                gold={"set": need(record, "task", str, where)},
            )

    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Nothing of its own: gold answers are with the harness."""
        note = "score with  lmms_eval --model megatron_v2pe --model_args rows=O,stride=S --tasks ..."
        return Score(mode=mode, metrics={}, cells=(), rows={}, notes=(note,))


def question(
    name: str, messages: Any, options: Mapping[str, Any], *, folder: Path, max_tiles: int = _MAX_TILES
) -> Request:
    """One chat question of lmms-eval as a request.

    Args:
        name: task, split and number of the document.
        messages: `ChatMessages` of lmms-eval, of one user.
        options: `max_new_tokens` and `until`.
        folder: its images go there.
        max_tiles: most tiles of an image.

    Raises:
        DataError: something that this model cannot be shown: sound, several turns, a sampled answer.
    """
    if options.get("do_sample") and float(options.get("temperature") or 0) > 0:
        raise DataError(f"{name}: asks for a sampled answer; answers here are greedy")
    parts: list[Part] = []
    for message in messages.messages:
        if message.role != "user":
            raise DataError(
                f"{name}: has a turn of the {message.role}; questions of one turn only are supported"
            )
        for content in message.content:
            if content.type == "text":
                parts.append(Part(kind="text", text=content.text))
            elif content.type == "image":
                parts.append(Part(kind="image", path=str(_image_file(content.url, folder))))
            elif content.type == "video" and isinstance(content.url, str):
                parts.append(Part(kind="video", path=content.url, frames=FRAMES))
            else:
                raise DataError(f"{name}: holds {content.type}, which this model cannot be given")
    return Request(
        id=name,
        parts=_on_own_lines(parts),
        max_new_tokens=int(options.get("max_new_tokens") or 16),
        max_tiles=max_tiles,
        stop=tuple(stop for stop in options.get("until") or () if stop),
        gold={"set": name.partition("/")[0]},
    )


def _on_own_lines(parts: Sequence[Part]) -> tuple[Part, ...]:
    """A line break after an image that a text follows, as the release's `chat` has it."""
    placed: list[Part] = []
    for part in parts:
        follows_image = placed and placed[-1].kind == "image"
        if part.kind == "text" and follows_image and not part.text.startswith("\n"):
            part = Part(kind="text", text=f"\n{part.text}")
        placed.append(part)
    return tuple(placed)


def _image_file(image: Any, folder: Path) -> Path:
    """The picture as a PNG file, named by its pixels."""
    content = io.BytesIO()
    image.convert("RGB").save(content, format="png")
    data = content.getvalue()
    path = folder / IMAGES / f"{hashlib.sha256(data).hexdigest()[:32]}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return path


def record(request: Request, folder: Path) -> None:
    """Append a request to the folder's questions, paths of images relative to it."""
    parts = []
    for part in request.parts:
        values = {key: value for key, value in asdict(part).items() if key != "data"}
        if part.kind == "image":
            values["path"] = str(Path(part.path).relative_to(folder))
        parts.append(values)
    line = {
        "id": request.id,
        "task": request.gold["set"],
        "parts": parts,
        "max_new_tokens": request.max_new_tokens,
        "max_tiles": request.max_tiles,
        "stop": list(request.stop),
    }
    append_json(folder / QUESTIONS, line)
