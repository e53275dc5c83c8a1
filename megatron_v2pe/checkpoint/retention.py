"""Step folders of a run: their names, the newest one, which to delete.

    run_dir/checkpoints/step_00000010/              complete: it has checkpoint.json
                        step_00000020.incomplete/   a save that was interrupted, or is being written
                        latest                      text file: name of the newest complete folder

`latest` is for people and scripts. A run that resumes (`resume.py`) lists the folders themselves, because a crash
between the commit of a folder and the update of `latest` must not lose the folder.

Only checkpoints whose files all have their full size count as kept. A damaged one is not deleted: its storage may come
back, and the older one that can replace it stays too.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from megatron_v2pe.checkpoint.files.folder import is_complete, read_info
from megatron_v2pe.checkpoint.files.staging import INCOMPLETE_SUFFIX
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.files import write_atomic

LATEST_FILE = "latest"
logger = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{8,})")


def checkpoints_path(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def step_path(run_dir: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return checkpoints_path(run_dir) / f"step_{step:08d}"


def committed_steps(run_dir: str | Path) -> list[int]:
    """Steps of all folders under their final name, oldest first, damaged ones too."""
    root = checkpoints_path(run_dir)
    found = (_STEP.fullmatch(path.name) for path in root.iterdir()) if root.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def complete_steps(run_dir: str | Path) -> list[int]:
    """Steps of all complete checkpoints, oldest first."""
    return [step for step in committed_steps(run_dir) if is_complete(step_path(run_dir, step))]


def checkpoint_of(folder: str | Path) -> Path:
    """The folder itself, or the newest complete checkpoint of a run whose folder was given.

    Raises:
        CheckpointError: a run folder without any complete checkpoint.
    """
    folder = Path(folder)
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    if is_complete(folder) or not checkpoints_path(run_dir).is_dir():
        return folder
    steps = complete_steps(run_dir)
    if not steps:
        raise CheckpointError(
            f"{folder}: is the folder of a run that has no complete checkpoint; see checkpoint.save_every, or give a "
            "checkpoint"
        )
    newest = step_path(run_dir, steps[-1])
    logger.info("%s is the folder of a run: its newest checkpoint %s is used", folder, newest.name)
    return newest


def write_latest(run_dir: str | Path, step: int) -> None:
    """Point `latest` at a step's folder, in one rename."""
    write_atomic(checkpoints_path(run_dir) / LATEST_FILE, step_path(run_dir, step).name + "\n")


def read_latest(run_dir: str | Path) -> int | None:
    """The step that `latest` names; None when there is no such file or it does not name a step's folder."""
    path = checkpoints_path(run_dir) / LATEST_FILE
    match = _STEP.fullmatch(path.read_text(errors="replace").strip()) if path.is_file() else None
    return int(match[1]) if match else None


def prune(run_dir: str | Path, *, keep: int, written: int) -> list[Path]:
    """Delete all but the `keep` newest good checkpoints, and the folders of interrupted saves.

    Args:
        run_dir: the run.
        keep: at least 1; checkpoints with a missing or cut file do not count, and are not deleted.
        written: step of the checkpoint that was committed last; never deleted, also when a run was
            restarted in a folder that holds later steps.

    Returns:
        The deleted folders.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, must be at least 1")
    good = [step for step in complete_steps(run_dir) if _is_good(step_path(run_dir, step))]
    doomed = [step_path(run_dir, step) for step in good[:-keep] if step != written]
    for path in doomed:
        # Renamed first: a half-deleted folder must not look complete.
        aside = path.with_name(path.name + INCOMPLETE_SUFFIX)
        path.rename(aside)
        shutil.rmtree(aside)
    return doomed + remove_incomplete(run_dir)


def remove_incomplete(run_dir: str | Path) -> list[Path]:
    """Delete the folders of interrupted saves; no save may be in progress. Returns the deleted folders."""
    left = sorted(checkpoints_path(run_dir).glob(f"step_*{INCOMPLETE_SUFFIX}"))
    for path in left:
        shutil.rmtree(path)
    return left


def _is_good(folder: Path) -> bool:
    try:
        read_info(folder)
    except CheckpointError as error:
        logger.warning("%s; it does not count as kept, and is not deleted", error)
        return False
    return True
