"""From which checkpoint a run continues: the newest one, and never silently an older one.

    step folders, newest first --> damaged? --no--> resume from it
                                      `--yes--> stop, and name the newest good one and how to continue from it
                                                `--checkpoint.fallback--> continue from it, with an error in the log

A folder that lost its `checkpoint.json`, and one that `latest` names but that is missing, are damaged too: both were
complete once. An interrupted save is not damaged: it never had its final name, and was never reported as saved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron_v2pe.checkpoint.files.folder import read_info
from megatron_v2pe.checkpoint.retention import (
    LATEST_FILE,
    checkpoints_path,
    committed_steps,
    read_latest,
    step_path,
)
from megatron_v2pe.checkpoint.state.ranks import gather_from_ranks, on_first_rank
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)

DamageOf = Callable[[Path], str]
"""What is wrong with a checkpoint folder, as a sentence; empty when nothing is."""


def resume_point(run_dir: str | Path, *, fallback: bool) -> Path | None:
    """The checkpoint to resume from, files checked by size; None for a run without any. No collective.

    Args:
        run_dir: the run.
        fallback: continue from an older checkpoint when newer ones are damaged, instead of stopping.

    Raises:
        CheckpointError: the newest checkpoint is damaged; names the newest good one and the ways out. Also with
            `fallback`, when none is good.
    """
    return _newest_good(run_dir, committed_steps(run_dir), fallback=fallback, damage_of=_damage_by_size)


def resume_point_in_full(run_dir: str | Path, *, fallback: bool, ranks: Ranks) -> Path | None:
    """The same with every file hashed, each rank its share. Collective: all ranks get one folder, or one error."""
    steps = on_first_rank(lambda: committed_steps(run_dir))
    return _newest_good(
        run_dir, steps, fallback=fallback, damage_of=lambda folder: _damage_in_full(folder, ranks)
    )


def verify_in_full(folder: str | Path, *, ranks: Ranks) -> None:
    """Hash every file of a checkpoint, each rank its share. Collective.

    Raises:
        CheckpointError: files differ from what was written; raised on all ranks.
    """
    damage = _damage_in_full(Path(folder), ranks)
    if damage:
        raise CheckpointError(damage)


def _newest_good(
    run_dir: str | Path, steps: list[int], *, fallback: bool, damage_of: DamageOf
) -> Path | None:
    damages, good = _lost(run_dir, steps), None
    for step in reversed(steps):
        folder = step_path(run_dir, step)
        damage = damage_of(folder)
        if not damage:
            good = folder
            break
        damages.append(damage)
    if not damages:
        return good
    found = "\n  ".join(damages)
    if good is None:
        raise CheckpointError(
            f"{found}\n  and no good checkpoint is left in {checkpoints_path(run_dir)}; restore one, or give the "
            "run a new runtime.run_dir"
        )
    if not fallback:
        raise CheckpointError(
            f"{found}\n  the newest good checkpoint is {good}; to continue from there and train the steps since then "
            "again, add checkpoint.fallback=true"
        )
    logger.error("%s\n  checkpoint.fallback is true: continuing from %s, an OLDER checkpoint", found, good)
    return good


def _lost(run_dir: str | Path, steps: list[int]) -> list[str]:
    """Whether `latest` names a checkpoint that is newer than all existing ones."""
    latest = read_latest(run_dir)
    if latest is None or (steps and latest <= steps[-1]):
        return []
    pointer = checkpoints_path(run_dir) / LATEST_FILE
    return [f"{pointer} names {step_path(run_dir, latest).name}, which does not exist"]


def _damage_by_size(folder: Path) -> str:
    try:
        read_info(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def _damage_in_full(folder: Path, ranks: Ranks) -> str:
    """The damage that any rank found; the same text on all."""
    mine = ""
    try:
        info = read_info(folder, verify="full", rank=ranks.rank, world_size=ranks.world_size)
        logger.info("%s: %d files verified in full", folder, len(info.files))
    except CheckpointError as error:
        mine = str(error)
    return "; ".join(sorted({text for text in gather_from_ranks(mine) if text}))
