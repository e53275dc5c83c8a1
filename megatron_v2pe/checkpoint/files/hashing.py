"""Sizes and hashes of a checkpoint's files: recorded when it is written, checked when it is read.

    writer   every rank hashes the files it wrote, from the page cache        -> checkpoint.json: bytes, sha256
    reader   `sizes`: always: a stat of each file, the hash of each small one, the sample of each large one
             `full`: every byte once more                                      -> sentences that name the file

Sizes detect interrupted copies and full disks. Small files (names, plain values, configuration, tokenizer) decide what
all the others mean, so they are hashed always. A sample is the hash of a few blocks of a large file: it finds a file of
another step or of another model, not a flipped bit. Only hashing everything detects that, at the price of reading all.
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
SMALL_BYTES = 16 * 2**20
"""Files up to this size are hashed whenever a checkpoint is opened."""
_SAMPLED_BLOCKS, _SAMPLED_BYTES = 16, 4096


@dataclass(frozen=True)
class FileRecord:
    """What `checkpoint.json` records about another file.

    Attributes:
        num_bytes: its size.
        sha256: of its contents.
        sample: of a large file, see `sample_of`; empty for a small one, and in checkpoints of earlier versions.
    """

    num_bytes: int
    sha256: str
    sample: str = ""

    def __post_init__(self) -> None:
        is_size = type(self.num_bytes) is int and self.num_bytes >= 0
        if not is_size or not isinstance(self.sha256, str) or not isinstance(self.sample, str):
            raise TypeError("not the size and hashes of a file")


def sha256_file(path: str | Path) -> str:
    """Hash of a file's contents, in hexadecimal."""
    running = hashlib.sha256()
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            running.update(view[:size])
    return running.hexdigest()


def sample_of(path: str | Path) -> str:
    """Hash of 16 blocks of 4 KiB, evenly spread over a file from its first to its last byte; in hexadecimal."""
    running = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - _SAMPLED_BYTES)
        for i in range(_SAMPLED_BLOCKS):
            running.update(os.pread(file.fileno(), _SAMPLED_BYTES, last * i // (_SAMPLED_BLOCKS - 1)))
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
        name: _recorded(path, known[name] if name in known else hashed[path]) for name, path in names.items()
    }


def _recorded(path: Path, sha256: str) -> FileRecord:
    size = path.stat().st_size
    return FileRecord(size, sha256, sample_of(path) if size > SMALL_BYTES else "")


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
        verify: `full` reads and hashes every file whose size is right; else the small ones are hashed, and of the
            large ones a sample.
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
    by_size = sorted(intact, key=lambda name: (-files[name].num_bytes, name))
    if verify == "full":
        return problems + _wrong_contents(folder, files, by_size[rank::world_size])
    small = [name for name in by_size if files[name].num_bytes <= SMALL_BYTES]
    large = [name for name in by_size if files[name].num_bytes > SMALL_BYTES]
    return [*problems, *_wrong_contents(folder, files, small), *_wrong_samples(folder, files, large)]


def _wrong_size(path: Path, name: str, record: FileRecord) -> str:
    if not path.is_file():
        return f"{name} is {'missing' if not path.exists() else 'not a file'}"
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


def _wrong_samples(folder: Path, files: Mapping[str, FileRecord], names: Sequence[str]) -> list[str]:
    try:
        return [
            f"{name} has the right size but is another file (of another step, or another model): blocks of it differ"
            for name in names
            if files[name].sample and sample_of(folder / name) != files[name].sample
        ]
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]


def digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, independent of the order of keys and of white space."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
