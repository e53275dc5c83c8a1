"""An annotation file in one quick look: the hash of its content, its lines, and where it can be cut.

The hash distinguishes a file that only grew (what was measured of its beginning stays good) from an edited one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.data.sources.file_kinds import HEAD_BYTES, annotation_kind, way_out
from megatron_v2pe.data.sources.storage import open_binary

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """Whole lines of a file.

    Attributes:
        start: byte offset of the first line.
        end: byte offset after the last line.
        first_line: 1-based number of the first line.
        num_lines: how many lines, empty ones included.
    """

    start: int
    end: int
    first_line: int
    num_lines: int


@dataclass(frozen=True, kw_only=True)
class FileScan:
    """What a file holds.

    Attributes:
        size: bytes.
        digest: sha256 of all of them.
        prefix_digest: sha256 of the first `prefix` bytes that were asked for; empty if there are fewer.
        blocks: the file in ranges of about 1 MiB.
        covered: bytes up to the last line break; what follows may still grow.
        covered_lines: lines up to there.
    """

    size: int
    digest: str
    prefix_digest: str
    blocks: tuple[ByteRange, ...]
    covered: int
    covered_lines: int


def check_kind(path: str) -> None:
    """Refuse a file that is something else than one json object a line, by its first bytes.

    Raises:
        DataError: it is, or it cannot be read.
    """
    try:
        with open_binary(path) as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the annotation file cannot be read") from None
    kind = annotation_kind(head) if head else ""
    if kind:
        raise DataError(f"{path}: is {kind}, not one json object a line; {way_out(kind)}")


def scan_file(path: str, *, prefix: int = 0) -> FileScan:
    """Read a file once, as fast as it can be hashed.

    Raises:
        DataError: it cannot be read.
    """
    hasher, prefix_digest = hashlib.sha256(), ""
    blocks: list[ByteRange] = []
    read = start = line = covered = covered_lines = 0
    first_line = 1
    try:
        with open_binary(path) as file:
            while block := file.read(_BLOCK_BYTES):
                if read < prefix <= read + len(block):
                    hasher.update(block[: prefix - read])
                    prefix_digest = hasher.hexdigest()
                    hasher.update(block[prefix - read :])
                else:
                    hasher.update(block)
                last_break = block.rfind(b"\n")
                if last_break >= 0:
                    line += block.count(b"\n")
                    covered, covered_lines = read + last_break + 1, line
                    blocks.append(byte_range(start, covered, first_line, line + 1))
                    start, first_line = covered, line + 1
                read += len(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the annotation file cannot be read") from None
    if start < read:
        blocks.append(byte_range(start, read, first_line, first_line + 1))
    return FileScan(
        size=read,
        digest=hasher.hexdigest(),
        prefix_digest=prefix_digest,
        blocks=tuple(blocks),
        covered=covered,
        covered_lines=covered_lines,
    )


def byte_range(start: int, end: int, first_line: int, next_line: int) -> ByteRange:
    """A range by the number of its first line and of the line after it."""
    return ByteRange(start=start, end=end, first_line=first_line, num_lines=next_line - first_line)
