"""Nothing is half-written: write aside, flush to the disk, rename.

    write_atomic     name.tmp-PID --fsync--> name
    commit_folder    folder.tmp   --fsync every file--> folder

A rename within one file system is atomic, so a reader, or a run that starts after a crash, sees the old
state or the new one. Folders are flushed too; without that a power cut may lose the rename itself.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_v2pe.core.errors import ConfigError


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a whole file or nothing; text is written as UTF-8, an existing file is replaced.

    Raises:
        OSError: the folder is missing or cannot be written; no temporary file is left.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def commit_folder(tmp: str | Path, final: str | Path) -> None:
    """Flush every file under `tmp`, then give the folder its final name.

    Args:
        tmp: complete folder on the same file system as `final`.
        final: the new name; must not exist, replacing a folder is not atomic and is the caller's decision.

    Raises:
        FileExistsError: `final` exists.
        OSError: a file cannot be flushed, or the rename fails.
    """
    tmp, final = Path(tmp), Path(final)
    if final.exists():
        raise FileExistsError(f"{final} exists; remove it first")
    for folder, _, names in os.walk(tmp):
        for name in names:
            _sync(Path(folder) / name)
        sync_folder(Path(folder))
    os.rename(tmp, final)
    sync_folder(final.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's list of names."""
    _sync(Path(folder))


def writable_folder(path: str | Path, *, field: str) -> Path:
    """Create a folder if needed and prove that files can be written there.

    Args:
        path: the folder.
        field: configuration field or option that named it, for the message.

    Raises:
        ConfigError: it is a file, or cannot be created or written.
    """
    folder = Path(path)
    probe = folder / f".write-test-{os.uname().nodename}-{os.getpid()}"  # ranks of other nodes probe it, too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"{field} is {str(path)!r}, but that folder cannot be written ({error.strerror}); "
            "choose another or correct its permissions"
        ) from None
    return folder


def remove_leftovers(folder: str | Path, *, before: float) -> list[Path]:
    """Delete temporary files of `write_atomic` and `writable_folder` whose process was killed.

    Args:
        folder: looked at, without the folders in it; it need not exist.
        before: seconds since 1970; younger files may belong to a process that lives.

    Returns:
        What was deleted.
    """
    removed = []
    for path in [*Path(folder).glob(".*.tmp-*"), *Path(folder).glob(".write-test-*")]:
        try:
            if path.is_file() and path.stat().st_mtime < before:
                path.unlink()
                removed.append(path)
        except FileNotFoundError:  # another process was faster
            continue
    return removed


@contextmanager
def explained_full_disk(folder: Path) -> Iterator[None]:
    """Report a disk that is full, or was made read-only during a run, as a mistake that can be corrected.

    Args:
        folder: of the run.

    Raises:
        ConfigError: not final, as there may be room again at the launcher's next start.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        explained = ConfigError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); {free_space(folder)}. Make room or "
            "raise the quota, and start again: the same command continues from the newest checkpoint"
        )
        explained.is_final = False
        raise explained from error


def free_space(folder: Path) -> str:
    """What a message says of the room where a folder is, or was before another rank removed it; raises nothing."""
    for place in (folder, *folder.parents):
        try:
            return f"the disk of {folder} has {shutil.disk_usage(place).free / 2**30:.2f} GiB free"
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"free space of {folder} is not known ({error.strerror})"
    return f"free space of {folder} is not known"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
