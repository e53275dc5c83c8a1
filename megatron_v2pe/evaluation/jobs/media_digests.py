"""SHA-256 of images and videos, each file read once; a cache beside the answers knows them by size and time."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_v2pe.core.jsonl import append_json, read_jsonl
from megatron_v2pe.evaluation.benchmarks.base import Request

_BLOCK = 2**20


class MediaDigests:
    """Digests of files.

    Args:
        folder: where `media.*.jsonl` files are read from; None knows none.
        write_to: file that new digests are appended to; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None, *, write_to: Path | None = None) -> None:
        self._known: dict[tuple[str, int, int], str] = {}
        self.write_to = write_to
        for path in sorted(folder.glob("media.*.jsonl")) if folder is not None else []:
            for _, values in read_jsonl(path, skip_cut=True):
                self._known[str(values["path"]), int(values["size"]), int(values["time"])] = values["sha256"]

    def of(self, request: Request) -> str:
        """Digest of all files of a request in order; empty where one cannot be read."""
        whole = hashlib.sha256()
        try:
            for part in request.parts:
                if part.path:
                    for file in _files(Path(part.path)):
                        whole.update(self._file(file).encode())
                elif part.data:
                    whole.update(hashlib.sha256(part.data).hexdigest().encode())
        except OSError:
            return ""
        return whole.hexdigest()

    def _file(self, path: Path) -> str:
        status = path.stat()
        key = str(path), status.st_size, status.st_mtime_ns
        found = self._known.get(key)
        if found is None:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
            found = self._known[key] = digest.hexdigest()
            if self.write_to is not None:
                append_json(
                    self.write_to, dict(zip(("path", "size", "time"), key, strict=True), sha256=found)
                )
        return found


def _files(path: Path) -> list[Path]:
    """A file, or the frames of a folder by name."""
    return sorted(path.iterdir()) if path.is_dir() else [path]
