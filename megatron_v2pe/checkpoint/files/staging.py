"""A folder is written aside and renamed when it is complete.

    target.incomplete/            `begin`: made empty, with room on its disk; no reader opens it
    target/                       `commit`: one rename

With `force` an existing target is moved aside first and deleted last, so that a crash loses neither.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_v2pe.checkpoint.files.folder import INFO_FILE
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import commit_folder

INCOMPLETE_SUFFIX = ".incomplete"
_OWN_FILES = {INFO_FILE, "config.json", "adapter_config.json"}  # a folder without any of them is not replaced
_SPARE_BYTES = 64 * 2**20

logger = logging.getLogger(__name__)


@contextmanager
def staged(target: str | Path, *, force: bool, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into; it is renamed to `target` when the block succeeds and deleted when it fails.

    Args:
        target: final name; must not exist unless `force`.
        force: replace what is at `target`, after the new content is complete.
        needed_bytes: what the block will write.

    Raises:
        CheckpointError: the target exists, cannot be created, or the disk has too little room.
    """
    target = Path(target)
    tmp = begin(target, force=force, needed_bytes=needed_bytes)
    try:
        yield tmp
        commit(tmp, target)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def begin(target: Path, *, force: bool, needed_bytes: int = 0) -> Path:
    """Create the empty `.incomplete` folder beside `target`; see `staged` for arguments and errors."""
    if target.exists() and not force:
        raise CheckpointError(f"{target}: exists already; choose another folder or add --force to replace it")
    if target.is_dir() and any(target.iterdir()) and not _OWN_FILES & set(os.listdir(target)):
        raise CheckpointError(
            f"{target}: is neither a checkpoint nor a Hugging Face folder; remove it yourself"
        )
    tmp = target.with_name(target.name + INCOMPLETE_SUFFIX)
    try:
        if tmp.exists():
            logger.warning("removing %s, which an interrupted writer left", tmp)
            shutil.rmtree(tmp)
        tmp.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{tmp}: cannot be created ({error.strerror}); choose another folder") from None
    free = shutil.disk_usage(tmp).free
    needed = needed_bytes + _SPARE_BYTES
    if free < needed:
        tmp.rmdir()
        raise CheckpointError(
            f"{target}: needs {needed / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB free; make room or "
            "choose another disk"
        )
    return tmp


def commit(tmp: Path, target: Path) -> None:
    """Rename the complete folder; a folder that it replaces is moved aside first, and deleted last."""
    replaced = target.with_name(target.name + ".replaced" + INCOMPLETE_SUFFIX)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    commit_folder(tmp, target)
    shutil.rmtree(replaced, ignore_errors=True)
