"""What a benchmark is: requests made from its published files, and scores of rows of answers.

    data folder --requests()--> Request --any model--> Response --+--> Row --score(mode)--> Score: metrics, cells, rows
                                   gold ----------------------------+

`Request.gold` holds what scoring needs; no model sees it. It is written with the answer, so that rows can be scored
without the data. Modes: `release` is the V2PE release's scorer, `original` the benchmark's own, `clean` ours, in which
empty answers are never right and empty cells never count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megatron_v2pe.core.errors import ConfigError, DataError

Mode = Literal["release", "original", "clean"]
MODES: tuple[Mode, ...] = ("release", "original", "clean")
IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a question.

    Attributes:
        kind: what it is.
        text: of a text.
        path: file of an image, or file or folder of frames of a video.
        data: file content of an image that lies inside an annotation file; `path` is empty then.
        clip: (start, end) of a video in seconds; None is the whole video.
        frames: how many frames of a video are shown, the middle one of each of as many equal intervals.
        fps: frames per second of a folder of frames.
        max_tiles: most tiles of this image; None is the request's limit.
        enlarge: factor by which an image is enlarged before it is tiled (MMMU).
    """

    kind: Literal["text", "image", "video"]
    text: str = ""
    path: str = ""
    data: bytes = field(default=b"", repr=False)
    clip: tuple[float, float] | None = None
    frames: int = 0
    fps: float | None = None
    max_tiles: int | None = None
    enlarge: int = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question.

    Attributes:
        id: unique within the benchmark.
        parts: the question in order.
        max_new_tokens: longest answer.
        max_tiles: most tiles of an image, its thumbnail not counted; 1 is no tiling.
        stop: texts that end an answer, beside the model's own end token.
        forced_answer: text to be scored token by token instead of a free answer.
        gold: what scoring needs, as json.
    """

    id: str
    parts: tuple[Part, ...]
    max_new_tokens: int
    max_tiles: int
    stop: tuple[str, ...] = ()
    forced_answer: str | None = None
    gold: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One answer.

    Attributes:
        id: of the request.
        text: the answer; with a forced answer what the model would have said at each of its tokens. Empty where
            there is an error.
        n_prompt: tokens of the prompt.
        n_visual: visual tokens among them.
        last_position: position of the prompt's last token, in text tokens.
        token_logprobs: natural logarithm of the probability of each token of a forced answer.
        forced_match: whether every token of a forced answer was the most probable one.
        seconds: from the request to the answer.
        error: why there is no answer; such a row is never scored as text.
    """

    id: str
    text: str = ""
    n_prompt: int = 0
    n_visual: int = 0
    last_position: float = 0.0
    token_logprobs: tuple[float, ...] | None = None
    forced_match: bool | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """An answer with what it is measured against."""

    response: Response
    gold: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Of the request."""
        return self.response.id

    @property
    def text(self) -> str:
        """The answer."""
        return self.response.text


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """Part of a benchmark with its own score.

    Attributes:
        group: task, set or category.
        length: lower end of its range of lengths; None where length is no axis.
        depth: lower end of its range of depths; None where depth is no axis.
        total: sum of the scores of its rows.
        count: rows.
    """

    group: str
    length: int | None = None
    depth: float | None = None
    total: float
    count: int

    @property
    def mean(self) -> float:
        """Score, 0..1."""
        return self.total / self.count


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a benchmark's answers are worth.

    Attributes:
        mode: reading under which everything below was computed.
        metrics: name -> value in 0..1; the first is the one that the paper's table shows.
        cells: finer than the metrics, for tables and pictures.
        rows: score of each row by its id.
        lengths: lower ends of the ranges of length, for `by_length`.
        by_length: scores of each task at each of `lengths`, as the mode averages them; NaN where it has none.
        notes: what a reader must know beside a number.
    """

    mode: Mode
    metrics: dict[str, float]
    cells: tuple[ScoreCell, ...]
    rows: dict[str, float]
    lengths: tuple[int, ...] = ()
    by_length: dict[str, list[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """One file or folder that a benchmark needs.

    Attributes:
        path: below the data folder.
        count: samples found in it; None where it is missing.
        published: samples that the published file has; None is unknown.
        problem: what is wrong with it.
    """

    path: str
    count: int | None
    published: int | None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """An annotation file of a benchmark.

    Attributes:
        set: task, set or split whose questions it holds.
        path: the file.
        root: folder that its media paths start from.
        published: unique samples of the published file; None is unknown.
    """

    set: str
    path: Path
    root: Path
    published: int | None = None


class Benchmark(ABC):
    """A published benchmark.

    Attributes:
        name: as commands call it.
        title: as papers call it.
        metric: name of the metric and the paper that defines it.
        modes: readings that differ; the first is the default.
        download: what to get, and where it goes.
        has_forced: whether a gold answer can be scored token by token.
        unscored: published sets that are not asked, and why their published number cannot be computed here.
    """

    name: str
    title: str
    metric: str
    download: str
    modes: tuple[Mode, ...] = ("release", "clean")
    unscored: Mapping[str, str] = MappingProxyType({})
    has_forced: bool = False

    @abstractmethod
    def files(self, data_dir: Path) -> list[DataFile]:
        """All annotation files of the published layout, there or not."""

    @abstractmethod
    def file_requests(self, file: DataFile, *, forced: bool) -> Iterator[Request]:
        """Questions of one file, in its order.

        Raises:
            DataError: the file is missing or a record is not as published; names file, line and key.
        """

    @abstractmethod
    def score(self, rows: Sequence[Row], mode: Mode) -> Score:
        """Worth of the rows, which have no errors and are at least one."""

    def recorded(self, path: Path) -> list[Row] | None:
        """Rows of predictions that the benchmark's own scripts wrote; None where there are none of that form."""
        return None

    def compared(self, path: Path, rows: Sequence[Row], mode: Mode) -> list[str]:
        """What the scores that were recorded beside such predictions say about ours; nothing where there are none."""
        return []

    def requests(
        self, data_dir: Path, *, sets: Sequence[str] = (), forced: bool = False
    ) -> Iterator[Request]:
        """Everything that is asked, file by file.

        Args:
            data_dir: folder in the published layout.
            sets: which tasks or sets; empty is all that are there.
            forced: score the gold answer token by token.

        Raises:
            DataError: nothing is there, a file is missing, or a record is not as published.
            ConfigError: no such set, or the benchmark has no forced answers.
        """
        if forced and not self.has_forced:
            raise ConfigError(f"--mode forced: {self.title} has no forced answers; use --mode generate")
        for file in self.chosen(data_dir, sets):
            yield from self.file_requests(file, forced=forced)

    def chosen(self, data_dir: Path, sets: Sequence[str]) -> list[DataFile]:
        """The files that are asked for, which must be there, or all that are there."""
        files = self.files(data_dir)
        known = list(dict.fromkeys(file.set for file in files))
        for name in sets:
            if reason := self.unscored.get(name.partition("@")[0]):
                raise ConfigError(f"--sets: {name!r} of {self.name} is not asked: {reason}; leave it out")
            if name not in known:
                raise ConfigError(f"--sets: {name!r} is no set of {self.name}; it has {', '.join(known)}")
        chosen = [file for file in files if (file.set in sets if sets else file.path.exists())]
        if not chosen:
            raise DataError(f"{data_dir}: has no file {files[0].path}; download {self.download}")
        return chosen

    def check(self, data_dir: Path) -> list[FileCheck]:
        """What is there, against what was published; every record is read and every media file looked for."""
        return [self._check(file, data_dir) for file in self.files(data_dir)]

    def _check(self, file: DataFile, data_dir: Path) -> FileCheck:
        shown = str(file.path.relative_to(data_dir))
        if not file.path.exists():
            return FileCheck(path=shown, count=None, published=file.published, problem="missing")
        ids: set[str] = set()
        problem = ""
        try:
            for request in self.file_requests(file, forced=False):
                ids.add(request.id)
                absent = next((p.path for p in request.parts if p.path and not Path(p.path).exists()), None)
                if absent and not problem:
                    problem = f"{request.id}: no such file: {absent}"
        except DataError as error:
            problem = str(error)
        return FileCheck(path=shown, count=len(ids), published=file.published, problem=problem)


def interleave(text: str, images: Sequence[str], **image: Any) -> tuple[Part, ...]:
    """Text with `<image>` placeholders and as many files, as parts in order.

    Example: `interleave("a <image> b", ["x.png"])` is text, image, text.

    Raises:
        ValueError: their numbers differ.
    """
    pieces = text.split(IMAGE_PLACEHOLDER)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"{len(pieces) - 1} times {IMAGE_PLACEHOLDER} for {len(images)} images")
    parts = [Part(kind="text", text=pieces[0])]
    for piece, path in zip(pieces[1:], images, strict=True):
        parts += [Part(kind="image", path=path, **image), Part(kind="text", text=piece)]
    return tuple(part for part in parts if part.kind != "text" or part.text)


def image_first(path: str, text: str) -> tuple[Part, ...]:
    """One image, a line break, the question: how the release's `chat` asks about one image."""
    return (Part(kind="image", path=path), Part(kind="text", text=f"\n{text}"))


def group_cells(scored: Sequence[tuple[str, float]]) -> tuple[ScoreCell, ...]:
    """Cells by group alone, in the order of first appearance."""
    sums: dict[str, list[float]] = {}
    for group, value in scored:
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    return tuple(ScoreCell(group=g, total=t, count=int(n)) for g, (t, n) in sums.items())


def row_scores(rows: Sequence[Row], values: Sequence[float]) -> dict[str, float]:
    """Score of each row by its id."""
    return {row.id: value for row, value in zip(rows, values, strict=True)}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
