"""Finished parts of a run: which samples belong together, and how parts become the final files.

    plan --parts_of--> [(path of the part, its samples)] --worker--> unfinished/part-000012.jsonl --join--> KIND.jsonl

A part has about a million tokens, so an interruption loses little and a thousand short samples cost one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.core.files import sync_folder, write_atomic
from megatron_v2pe.synthesis.document.records import MM_NIAH_TASKS, mm_niah_record
from megatron_v2pe.synthesis.kinds import SampleSpec
from megatron_v2pe.synthesis.settings import META, WORK

PART_TOKENS = 2**20
MOST_SAMPLES = 256
MM_NIAH = "mm_niah"


@dataclass(frozen=True, kw_only=True)
class OutputPart:
    """Consecutive samples of one kind and the file that they go to."""

    path: Path
    specs: tuple[SampleSpec, ...]


def parts_of(specs: Sequence[SampleSpec], out: Path) -> list[OutputPart]:
    """Cut a plan into parts; the same plan is always cut alike."""
    groups: list[list[SampleSpec]] = []
    tokens = 0
    for spec in specs:
        is_full = groups and (tokens + spec.tokens > PART_TOKENS or len(groups[-1]) == MOST_SAMPLES)
        if not groups or is_full or groups[-1][0].kind != spec.kind:
            groups.append([])
            tokens = 0
        groups[-1].append(spec)
        tokens += spec.tokens
    return [
        OutputPart(path=out / WORK / f"part-{number:06d}.jsonl", specs=tuple(group))
        for number, group in enumerate(groups)
    ]


def join_parts(parts: Iterable[OutputPart], out: Path, *, with_mm_niah: bool, data: DataConfig) -> None:
    """Write the final files, the meta json last.

    Args:
        parts: all of them, finished.
        out: output folder.
        with_mm_niah: also write MM-NIAH files.
        data: tiling that lengths were counted with; it goes into the meta json, so that training tiles alike.
    """
    by_kind: dict[str, list[OutputPart]] = {}
    for part in parts:
        by_kind.setdefault(part.specs[0].kind, []).append(part)
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        niah: dict[str, IO[str]] = {}
        for kind, members in by_kind.items():
            task = MM_NIAH_TASKS.get(kind) if with_mm_niah else None
            if task is not None and task not in niah:
                (out / MM_NIAH).mkdir(exist_ok=True)
                niah[task] = stack.enter_context(_new_file(out / MM_NIAH / f"{task}.jsonl"))
            with _new_file(out / f"{kind}.jsonl") as file:
                for line in _lines(members):
                    file.write(line)
                    counts[kind] = counts.get(kind, 0) + 1
                    if task is not None:
                        niah[task].write(json.dumps(mm_niah_record(json.loads(line))) + "\n")
    write_atomic(out / META, _meta(counts, data))


def _lines(parts: Iterable[OutputPart]) -> Iterator[str]:
    for part in parts:
        with open(part.path, encoding="utf-8") as file:
            yield from file


def _meta(counts: dict[str, int], data: DataConfig) -> str:
    """The meta json that `data.meta` and `evaluate --data` read; paths in it are relative to it."""
    entries = {
        f"synthetic-{kind}": {
            "annotation": f"{kind}.jsonl",
            "root": ".",
            "repeat_time": 1,
            "data_augment": False,
            "max_dynamic_patch": data.max_dynamic_patch,
            "dynamic_image_size": data.dynamic_image_size,
            "length": count,
        }
        for kind, count in counts.items()
    }
    return json.dumps(entries, indent=2) + "\n"


@contextmanager
def _new_file(path: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when it is whole and on the disk."""
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)
