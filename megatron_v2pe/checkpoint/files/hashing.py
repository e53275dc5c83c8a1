"""Sizes and hashes of a checkpoint's files: recorded when it is written, checked when it is read.

    writer   every rank hashes the files it wrote, from the page cache        -> checkpoint.json: bytes, sha256
    reader   `sizes`: a stat per file, always; `full`: every byte once more   -> sentences that name the file

Sizes detect interrupted copies and full disks; only hashes detect a flipped bit, at the price of reading everything.
Files are hashed in parallel threads (hashlib releases the GIL), so one large file uses one core.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

VerifyLevel = Literal["sizes", "full"]
"""How closely a checkpoint's files are checked before they are used."""

_BLOCK_BYTES = 4 * 2**20
_MAX_THREADS = 8


@dataclass(frozen=True)
class FileRecord:
    """What `checkpoint.json` records about another file.

    Attributes:
        num_bytes: its size.
        sha256: of its contents.
    """

    num_bytes: int
    sha256: str


def sha256_file(path: str | Path) -> str:
    """Hash of a file's contents, in hexadecimal."""
    running = hashlib.sha256()
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            running.update(view[:size])
    return running.hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Hashes of several files, a thread for each up to the number of cores."""
    paths = list(paths)
    threads = max(1, min(_MAX_THREADS, len(paths), os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


def record_files(
    folder: Path, paths: Iterable[Path], *, known: Mapping[str, str] | None = None
) -> dict[str, FileRecord]:
    """Sizes and hashes of files below `folder`, by their path in it.

    Args:
        folder: the checkpoint.
        paths: its files.
        known: hashes that other ranks have computed, by path in the folder.
    """
    names = {str(path.relative_to(folder)): path for path in sorted(paths)}
    known = known or {}
    hashed = sha256_files(path for name, path in names.items() if name not in known)
    return {
        name: FileRecord(path.stat().st_size, known[name] if name in known else hashed[path])
        for name, path in names.items()
    }


def find_damage(
    folder: Path,
    files: Mapping[str, FileRecord],
    *,
    verify: VerifyLevel = "sizes",
    rank: int = 0,
    world_size: int = 1,
) -> list[str]:
    """Differences between what was recorded and what is there, one sentence for each file.

    Args:
        folder: the checkpoint.
        files: path in the folder -> what was recorded.
        verify: `full` reads and hashes every file whose size is right.
        rank: of the processes that share the hashing; every one checks the sizes.
        world_size: how many share it.
    """
    problems: list[str] = []
    intact: list[str] = []
    for name, record in files.items():
        problem = _wrong_size(folder / name, name, record)
        if problem:
            problems.append(problem)
        else:
            intact.append(name)
    if verify == "full":
        by_size = sorted(intact, key=lambda name: (-files[name].num_bytes, name))
        problems += _wrong_contents(folder, files, by_size[rank::world_size])
    return problems


def _wrong_size(path: Path, name: str, record: FileRecord) -> str:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    return "" if size == record.num_bytes else f"{name} has {size} bytes instead of {record.num_bytes}"


def _wrong_contents(folder: Path, files: Mapping[str, FileRecord], names: Sequence[str]) -> list[str]:
    try:
        found = sha256_files(folder / name for name in names)
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    return [
        f"{path.relative_to(folder)} has the right size but other contents "
        f"(sha256 {value[:12]}... instead of {files[str(path.relative_to(folder))].sha256[:12]}...)"
        for path, value in found.items()
        if value != files[str(path.relative_to(folder))].sha256
    ]


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, independent of the order of keys and of white space."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
