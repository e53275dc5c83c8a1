"""`evaluate --benchmark`: from a checkpoint and a data folder to rows, scores and pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_v2pe.checkpoint.model_source import source_digest
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.evaluation.benchmarks.base import Benchmark
from megatron_v2pe.evaluation.jobs.identity import RunIdentity, claim_folder, file_digest, read_manifest
from megatron_v2pe.evaluation.jobs.pictures import write_pictures
from megatron_v2pe.evaluation.jobs.report import (
    StrideScore,
    chosen_mode,
    score_folder,
    write_report,
)
from megatron_v2pe.evaluation.jobs.runner import (
    IMAGES,
    BenchmarkAnswerer,
    Work,
    answer_all,
    limited,
    unique_ids,
    with_files,
)
from megatron_v2pe.evaluation.retrieval.questions import StrideSetting


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What is asked for.

    Attributes:
        checkpoint: folder.
        data_dir: folder of the benchmark's files.
        out: folder for rows and scores.
        sets: which sets; empty is all that are there.
        limit: most questions of a set; 0 is all.
        is_forced: score gold answers token by token instead of letting the model speak.
        retry_errors: ask again what ended with an error.
        settings: everything else that an answer depends on, in words.
        mode: how answers are read; empty is the benchmark's default.
        is_first: one process of all prepares the folder and scores.
        trained_length: positions that the checkpoint was trained for.
        tokens_per_tile: visual tokens of one tile.
    """

    checkpoint: Path
    data_dir: Path
    out: Path
    sets: tuple[str, ...]
    limit: int
    is_forced: bool
    retry_errors: bool
    settings: str
    mode: str
    is_first: bool
    trained_length: int
    tokens_per_tile: int


def run_job(
    benchmark: Benchmark,
    strides: list[StrideSetting],
    answerer: BenchmarkAnswerer,
    options: JobOptions,
) -> tuple[str, list[StrideScore]]:
    """Answer what is missing, then score; every process calls this.

    Returns:
        Table and scores; empty on all processes but the first.

    Raises:
        ConfigError: an option does not fit, or the folder holds another evaluation.
        DataError: the data is not as published, or rows do not belong to it.
    """
    mode = chosen_mode(benchmark, options.mode)
    if not options.data_dir.is_dir():
        raise ConfigError(f"--data-dir: {options.data_dir}: no such folder; download {benchmark.download}")
    asked = benchmark.requests(options.data_dir, sets=options.sets, forced=options.is_forced)
    requests = [
        with_files(request, options.out / IMAGES, is_writer=options.is_first)
        for request in limited(asked, options.limit)
    ]
    if not requests:
        raise DataError(f"{options.data_dir}: the files of {benchmark.title} hold no question")
    unique_ids(requests)
    identity = _identity(benchmark, strides, options, num_requests=len(requests))
    claim_folder(options.out, identity, is_writer=options.is_first)
    answer_all(
        Work(
            requests=requests,
            settings=strides,
            folder=options.out,
            retry_errors=options.retry_errors,
            is_first=options.is_first,
        ),
        answerer,
    )
    if not options.is_first:
        return "", []
    scores = score_folder(benchmark, options.out, mode=mode)
    text = write_report(options.out, benchmark, mode, scores)
    draw(options.out, benchmark, scores, out=options.out)
    return text, scores


def draw(folder: Path, benchmark: Benchmark, scores: list[StrideScore], *, out: Path) -> None:
    """Pictures of a folder of `evaluate`, into `out`."""
    manifest = read_manifest(folder)
    write_pictures(
        out,
        benchmark.title,
        scores,
        trained_length=int(manifest.get("trained_length", 0)),
        tokens_per_tile=int(manifest.get("tokens_per_tile", 0)),
    )


def _identity(
    benchmark: Benchmark, strides: list[StrideSetting], options: JobOptions, *, num_requests: int
) -> RunIdentity:
    files = benchmark.chosen(options.data_dir, options.sets)
    return RunIdentity(
        benchmark=benchmark.name,
        checkpoint=str(options.checkpoint),
        checkpoint_digest=source_digest(options.checkpoint),
        strides=tuple(setting.name for setting in strides),
        way="forced" if options.is_forced else "generate",
        sets=options.sets,
        limit=options.limit,
        settings=options.settings,
        annotations={str(file.path.relative_to(options.data_dir)): file_digest(file.path) for file in files},
        num_requests=num_requests,
        trained_length=options.trained_length,
        tokens_per_tile=options.tokens_per_tile,
    )
