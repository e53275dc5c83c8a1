"""An epoch's plan as arrays, computed once per node and mapped into memory by every rank and worker.

first rank: lock --make--> arrays --aside, fsync, rename--> cache_dir/plans/NAME/*.npy --mmap--> all ranks
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_v2pe.core.errors import DataError
from megatron_v2pe.core.files import commit_folder
from megatron_v2pe.data.index.cache import locked

logger = logging.getLogger(__name__)
_KEPT_PLANS = 8  # epochs; one of 3 million draws is 25 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochPlan:
    """Packs of one epoch, P packs of m draws in all.

    Attributes:
        rows: int32 [m], rows of the mixture (all data sets in a row).
        occurrences: int32 [m], how often the row was drawn before in this epoch.
        bounds: int64 [P+1], where each pack's draws begin.
        costs: float64 [P], cost of each pack, see `cost`.
    """

    rows: NDArray[np.int32]
    occurrences: NDArray[np.int32]
    bounds: NDArray[np.int64]
    costs: NDArray[np.float64]

    @property
    def num_packs(self) -> int:
        """Packs of the epoch."""
        return len(self.bounds) - 1


def stored_plan(cache_dir: str | Path, name: str, make: Callable[[], EpochPlan]) -> EpochPlan:
    """The plan of that name, made if it is not there, mapped if it can be.

    Args:
        cache_dir: folder of the measured lengths.
        name: unique to the plan: fingerprint, stage, epoch.
        make: computes it.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = Path(cache_dir) / "plans"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            found = _opened(folder / name)
            if found is None:
                _write(folder / name, make())
                _forget_oldest(folder)
                found = _opened(folder / name)
    except OSError as error:
        raise DataError(
            f"data.cache_dir: {folder}: {error.strerror}; give a folder that can be written"
        ) from error
    if found is None:
        raise DataError(f"data.cache_dir: {folder / name}: cannot be read back after it was written")
    return found


def _opened(folder: Path) -> EpochPlan | None:
    """A stored plan; None when there is none or it is damaged."""
    if not folder.exists():
        return None
    try:
        arrays = {
            each.name: np.load(folder / f"{each.name}.npy", mmap_mode="r", allow_pickle=False)
            for each in fields(EpochPlan)
        }
        plan = EpochPlan(**arrays)
        if len(plan.rows) == len(plan.occurrences) == plan.bounds[-1] and plan.num_packs == len(plan.costs):
            return plan
        raise ValueError("arrays of different lengths")
    except (OSError, ValueError, IndexError, EOFError) as error:
        logger.warning("%s: damaged plan (%s); it is made again", folder, error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(folder: Path, plan: EpochPlan) -> None:
    aside = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for each in fields(EpochPlan):
        np.save(aside / f"{each.name}.npy", getattr(plan, each.name))
    commit_folder(aside, folder)


def _forget_oldest(folder: Path) -> None:
    """Keep the newest plans; ranks that still map an older one keep it until they let go."""
    plans = sorted(folder.glob("[!.]*-stage*"), key=lambda path: path.stat().st_mtime)
    for old in plans[:-_KEPT_PLANS]:
        shutil.rmtree(old, ignore_errors=True)
