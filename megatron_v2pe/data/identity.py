"""What a rank sees of the data of a run, from little reading: to compare ranks, not to find damage.

    meta json           all of its bytes
    annotation file     size, and blocks of bytes; up to 8 MiB all of them
    images and videos   of records spread over the file: size, and blocks of bytes; up to 256 KiB all of them

Times of files are left out: copies on disks of the nodes differ in them. Of remote files size and tag count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_v2pe.core.errors import V2PEError
from megatron_v2pe.core.file_sample import sampled_digest
from megatron_v2pe.data.samples.records import parse_line
from megatron_v2pe.data.sources import storage
from megatron_v2pe.data.sources.meta import DatasetEntry, read_meta

_MOST_RECORDS = 2048  # of a mixture
_FEWEST_RECORDS = 16  # of a data set
_MOST_REMOTE = 8  # requests of each rank for each data set
_WHOLE_BYTES = 8 * 2**20
_THREADS = 8


def data_identity(meta: str | Path, *, name: str = "data.meta") -> dict[str, str]:
    """What a rank sees of the data that a meta json names.

    Args:
        meta: the meta json.
        name: field that names it.

    Raises:
        DataError: see `read_meta`.
    """
    entries = read_meta(meta)
    facts = {f"{name} content": hashlib.sha256(Path(meta).read_bytes()).hexdigest()[:16]}
    most = max(_FEWEST_RECORDS, _MOST_RECORDS // len(entries))
    for entry in entries:
        facts |= {f"{key} ({name})": value for key, value in _entry_identity(entry, most).items()}
    return facts


def _entry_identity(entry: DatasetEntry, most: int) -> dict[str, str]:
    where = f"data set {entry.name}"
    facts = {f"{where} {name}": repr(value) for name, value in dataclasses.asdict(entry).items()}
    try:
        if storage.is_remote(entry.annotation):
            facts[f"{where} annotation content"] = _remote_identity(entry.annotation)
        else:
            with storage.open_binary(entry.annotation) as file:
                facts[f"{where} annotation content"] = sampled_digest(
                    file, whole_bytes=_WHOLE_BYTES, blocks=64, block_bytes=2**16
                )
        lines = list(_spread_lines(entry.annotation, most))
    except OSError as error:
        return {**facts, f"{where} annotation content": f"cannot be read ({error.strerror})"}
    paths = list(dict.fromkeys(_media_paths(lines, entry)))
    local = [path for path in paths if not storage.is_remote(path)]
    remote = [path for path in paths if storage.is_remote(path)][:_MOST_REMOTE]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(remote, pool.map(_remote_identity, remote), strict=True))
        found |= zip(local, pool.map(_local_identity, local), strict=True)
    return facts | {f"{where} file {path}": identity for path, identity in found.items()}


def _spread_lines(path: str, most: int) -> Iterator[bytes]:
    """Lines of an annotation file: all of a small one, else some of them, evenly over its bytes."""
    most = _MOST_REMOTE if storage.is_remote(path) else most
    with storage.open_binary(path) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if size <= _WHOLE_BYTES:
            lines = [line for line in file if line.strip()]
            yield from lines[:: max(1, -(-len(lines) // most))]
            return
        for index in range(most):
            file.seek(size * index // most)
            file.readline(_WHOLE_BYTES)
            yield file.readline(_WHOLE_BYTES)


def _media_paths(lines: Iterable[bytes], entry: DatasetEntry) -> Iterator[str]:
    """Files of the records. Bad lines name none: the index reports them, and their bytes were compared."""
    for line in lines:
        try:
            record = parse_line(line, entry=entry, line_number=0)
        except V2PEError:
            continue
        for medium in record.media:
            path = getattr(medium, "path", "")
            if path:
                yield path


def _local_identity(path: str) -> str:
    try:
        if storage.is_folder(path):
            names = sorted(storage.list_files(path))
            return f"{len(names)} files, sha256 {hashlib.sha256('/'.join(names).encode()).hexdigest()[:16]}"
        if not storage.is_file(path):
            return "no such file"
        with storage.open_binary(path) as file:
            return sampled_digest(file, whole_bytes=2**18, blocks=4, block_bytes=2**14)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _remote_identity(path: str) -> str:
    try:
        return repr(storage.file_facts(path)[1:])
    except OSError as error:
        return f"cannot be read ({error.strerror})"
