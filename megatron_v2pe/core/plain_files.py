"""Small files of others, read as data: regular, not larger than they may be, and what they say they are.

A folder that was downloaded may hold a pipe, a device, a link to one, a git-lfs pointer, or a web page with an error
where a file should be. Each is named for what it is, before a parser stumbles over it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import CheckpointError

MAX_JSON_BYTES = 128 * 2**20
"""Of one json file; the largest tokenizer.json of a published InternVL has 11 MiB."""

_LFS = b"version https://git-lfs.github.com/spec/"
_WEB_PAGE = (b"<!doctype html", b"<html")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def foreign_content(head: bytes) -> str:
    """What a file is instead of itself, by its first bytes, with the way out; empty when nothing says so."""
    if head.startswith(_LFS):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download it again"
    if head.lstrip()[:14].lower().startswith(_WEB_PAGE):
        return "is a web page, not the file itself: the download was answered with a page; download it again"
    return ""


def not_regular(path: Path) -> str:
    """What is at a path instead of a regular file; empty for a regular file.

    Raises:
        OSError: nothing can be found out, for example because there is nothing.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    return "" if kind == stat.S_IFREG else f"is {_KINDS.get(kind, 'not a regular file')}, not a file"


def read_plain(path: Path, *, max_bytes: int) -> bytes:
    """Contents of a regular file.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is no regular file, cannot be read, is larger than `max_bytes`, or is a git-lfs pointer or
            a web page.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    found = os.fstat(descriptor)
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise CheckpointError(f"{path}: is {_KINDS.get(kind, 'not a regular file')}, not a file")
    with os.fdopen(descriptor, "rb") as stream:
        if found.st_size > max_bytes:
            raise CheckpointError(f"{path}: has {found.st_size:,} bytes, but must have at most {max_bytes:,}")
        try:
            content = stream.read(max_bytes + 1)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    foreign = foreign_content(content[:512])
    if foreign:
        raise CheckpointError(f"{path}: {foreign}")
    return content


def read_plain_text(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """The same as UTF-8 text; errors as `read_plain` has them."""
    try:
        return read_plain(path, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error})") from None


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A json object; errors as `read_plain` has them.

    Raises:
        FileNotFoundError: there is no file.
        CheckpointError: it is no json, is nested too deep, or is json of another kind.
    """
    text = read_plain_text(path, max_bytes=max_bytes)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid json ({_short(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a json object, found {type(values).__name__}")
    return values


def _short(error: Exception) -> str:
    return str(error)[:200]
