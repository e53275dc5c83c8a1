"""Where data lie: local paths directly, `scheme://` addresses through fsspec.

    /data/a.jpg, a.jpg        open(), as ever
    s3://bucket/a.jpg         fsspec + s3fs, endpoint and credentials from the environment, never from a data file

Everything here raises OSError as a local file would, whatever the remote library raises, so that callers have one
kind of failure to translate. Reads are bounded: no object is read in whole before its size is known to be sane.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.excerpt import shortened

MAX_OBJECT_BYTES = 512 * 2**20  # of an image or a line; a video is read in blocks
_SEPARATOR = "://"
_BLOCK_BYTES = 2**20
_MOST_NAME = 400  # characters of a name in a message
_PACKAGES = {
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
}
# No part is empty or begins with a dot.
_PLAIN_NAME = re.compile(r"[^/.\0][^/\0]*(/[^/.\0][^/\0]*)*").fullmatch
_VERSION_FACTS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "updated")


def is_remote(path: str) -> bool:
    """Whether a path is an address with a scheme."""
    return _SEPARATOR in path


def check_address(path: str, *, where: str) -> str:
    """Refuse an address that carries credentials; they would end up in logs and caches.

    Raises:
        DataError: user information or a query part; the address itself is not repeated.
    """
    if is_remote(path):
        host = path.split(_SEPARATOR, 1)[1].split("/", 1)[0]
        if "@" in host or "?" in path:
            raise DataError(
                f"{where}: an address with credentials or a query (user@host, ?...) is not accepted; put them where "
                "the storage library looks (environment variables, its own configuration files)"
            )
    return path


def resolve_path(root: str, name: str, *, where: str, kind: str = "image") -> str:
    """File `name` inside folder `root`.

    Args:
        root: folder or address of the data set's files; empty means that names are complete paths.
        name: path as the annotation gives it; an address must lie below `root`.
        where: place of the annotation, for the message.
        kind: what the name means, for the message.

    Raises:
        DataError: the name is absolute, climbs out of `root`, or is an address elsewhere.
    """
    if "\0" in name:
        raise DataError(
            f"{where}: {kind} {shortened(name, _MOST_NAME)} holds a null character; give a file name"
        )
    if is_remote(name):
        return _resolve_address(root, check_address(name, where=where), where, kind)
    if not root:
        return name
    # Most names are plain, and a mixture has millions of them; the others are put into their shortest form.
    is_plain = _PLAIN_NAME(name) is not None
    inside = name if is_plain else posixpath.normpath(name)
    if not is_plain and (posixpath.isabs(inside) or inside.split("/")[0] == ".."):
        raise DataError(
            f"{where}: {kind} {shortened(name, _MOST_NAME)} lies outside the data set's root {root!r}; give a path "
            "inside the root"
        )
    if is_remote(root):
        check_address(f"{root.rstrip('/')}/{inside}", where=where)
        return f"{root.rstrip('/')}/{inside}"
    return f"{root}{inside}" if root.endswith("/") else f"{root}/{inside}"


def _resolve_address(root: str, name: str, where: str, kind: str) -> str:
    scheme, rest = name.split(_SEPARATOR, 1)
    address = f"{scheme}{_SEPARATOR}{posixpath.normpath(rest)}"
    climbs = ".." in rest.split("/")
    if climbs or not is_remote(root) or not address.startswith(root.rstrip("/") + "/"):
        raise DataError(
            f"{where}: {kind} {shortened(name, _MOST_NAME)} is not a file below the data set's root "
            f"{root!r}; copy it there, or give the data set a root that is the beginning of its addresses"
        )
    return address


@contextmanager
def _remote_errors(path: str) -> Iterator[None]:
    """Whatever a storage library raises becomes an OSError with a one-line text."""
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise OSError(errno.EIO, text, path) from error


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path within it."""
    from fsspec.core import url_to_fs

    scheme = path.split(_SEPARATOR, 1)[0]
    try:
        with _remote_errors(path):
            filesystem, inside = url_to_fs(path)
    except OSError as error:
        if isinstance(error.__cause__, ImportError):
            package = _PACKAGES.get(scheme, "the one that fsspec names")
            raise ConfigError(
                f"{path}: {scheme}:// needs a package that is not installed: {package} ({error.__cause__}); "
                f"run  pip install {_PACKAGES.get(scheme, 'PACKAGE')}"
            ) from None
        if isinstance(error.__cause__, ValueError):
            raise DataError(f"{path}: {error.__cause__}; known: s3, gs, abfs, http, file, ...") from None
        raise
    return filesystem, inside


def _open_regular(path: str, flags: int) -> int:
    """An opener that does not wait at a pipe, and takes nothing but files: no device either, which has no end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", path)
        raise OSError(errno.EINVAL, "is a pipe, socket or device, not a file", path)
    return descriptor


@contextmanager
def open_binary(path: str) -> Iterator[BinaryIO]:
    """A file for reading, buffered and seekable.

    Raises:
        OSError: it cannot be opened or read.
        DataError: nobody knows its scheme.
        ConfigError: the package for its scheme is not installed.
    """
    if not is_remote(path):
        with open(path, "rb", opener=_open_regular) as file:
            yield file
        return
    filesystem, inside = _filesystem(path)
    with _remote_errors(path), filesystem.open(inside, "rb", block_size=_BLOCK_BYTES) as raw:
        yield io.BufferedReader(raw, _BLOCK_BYTES)


def read_range(path: str, start: int | None, stop: int | None) -> bytes:
    """Bytes start..stop-1 of a remote file; a negative start counts from its end. One request.

    Raises:
        OSError: it cannot be read.
    """
    filesystem, inside = _filesystem(path)
    with _remote_errors(path):
        return bytes(filesystem.cat_file(inside, start=start, end=stop))


def read_whole(path: str, *, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """A remote file in one request.

    Raises:
        OSError: it cannot be read, or is longer than `max_bytes`.
    """
    content = read_range(path, 0, max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", path)
    return content


def read_line(path: str, offset: int, *, max_bytes: int = MAX_OBJECT_BYTES) -> bytes:
    """The line that begins at a byte offset.

    Raises:
        OSError: it cannot be read, or is longer than `max_bytes`.
    """
    with open_binary(path) as file:
        file.seek(offset)
        line = file.readline(max_bytes + 1)
    if len(line) > max_bytes:
        raise OSError(errno.EFBIG, f"the line at byte {offset} has more than {max_bytes} bytes", path)
    return line


def file_facts(path: str) -> list[str | int]:
    """What differs between versions of a file: address, size, and time or tag.

    Raises:
        OSError: there is no such file.
    """
    if not is_remote(path):
        status = os.stat(path)
        return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    filesystem, inside = _filesystem(path)
    with _remote_errors(path):
        info = filesystem.info(inside)
    return [path, int(info["size"]), *(str(info[name]) for name in _VERSION_FACTS if name in info)]


def is_file(path: str) -> bool:
    """Whether a file exists.

    Raises:
        OSError: a remote store cannot be asked.
    """
    if not is_remote(path):
        return os.path.isfile(path)
    filesystem, inside = _filesystem(path)
    with _remote_errors(path):
        return bool(filesystem.isfile(inside))


def is_folder(path: str) -> bool:
    """Whether a folder exists.

    Raises:
        OSError: a remote store cannot be asked.
    """
    if not is_remote(path):
        return os.path.isdir(path)
    filesystem, inside = _filesystem(path)
    with _remote_errors(path):
        return bool(filesystem.isdir(inside))


def list_files(folder: str) -> list[str]:
    """Names of the files in a folder, in no order.

    Raises:
        OSError: it cannot be listed.
    """
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    filesystem, inside = _filesystem(folder)
    with _remote_errors(folder):
        found = filesystem.ls(inside, detail=True)
    return [posixpath.basename(entry["name"]) for entry in found if entry["type"] == "file"]
