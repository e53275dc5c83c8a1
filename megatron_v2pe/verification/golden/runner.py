"""Which groups of golden cases a folder has, and how they are run.

    folder --GROUPS, whose file is there--> group module --run()--> rows

With a parallel plan only the groups of the model run, on every rank; rank 0 reports.
"""

from __future__ import annotations

import functools
import importlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.verification.golden.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of cases.

    Attributes:
        name: value of `--group`.
        module: module of `groups/` that runs it.
        function: function of the module.
        files: the group is present in a folder that holds one of these (patterns).
        is_model: the group runs the whole model and has a `parallel` argument.
    """

    name: str
    module: str
    files: tuple[str, ...]
    function: str = "run"
    is_model: bool = False


PIIP_FILES = ("modules", "classification", "detection", "towers", "llava", "resize", "geometry")
GROUPS = (
    Group(name="positions", module="inputs.positions", files=("positions/positions.json",)),
    Group(name="rope", module="inputs.positions", function="run_rope", files=("positions/rope_tables.json",)),
    Group(name="sharding", module="inputs.sharding", files=("sharding/*.json",)),
    Group(name="tiling", module="inputs.tiling", files=("tiling/*.json", "preprocess/*.json")),
    Group(
        name="text",
        module="inputs.text",
        files=tuple(
            f"text/{name}.json" for name in ("conversations", "tokenizer", "templates", "hf_processor")
        ),
    ),
    Group(name="packing", module="inputs.packing", files=("packing/*.json", "text/dataset_items.json")),
    Group(name="formats", module="models.formats", files=("ckpt_hf/*/config.json",)),
    Group(name="loss", module="models.loss", files=("packing/loss.json",)),
    Group(name="model", module="models.model", files=("forward/*.json",), is_model=True),
    Group(
        name="piip",
        module="models.piip",
        files=("piip/*.json", *(f"{name}.json" for name in PIIP_FILES)),
    ),
    Group(name="generation", module="models.generation", files=("generation/*.json",), is_model=True),
)


def select_groups(folder: Path, *, name: str | None, model_only: bool) -> tuple[Group, ...]:
    """Groups that the folder has and the user asked for.

    Raises:
        ConfigError: no such folder, an unknown name, or nothing to run.
    """
    if not folder.is_dir():
        raise ConfigError(f"check-golden: {folder} is not a folder; give one in the golden format")
    known = {group.name: group for group in GROUPS}
    if name is not None and name not in known:
        raise ConfigError(f"--group is {name!r}, known groups are {', '.join(known)}")
    wanted = GROUPS if name is None else (known[name],)
    if model_only and name is not None and not wanted[0].is_model:
        raise ConfigError(f"--group is {name!r}, which does not run the model; omit --tp, --pp, --cp, --sp")
    chosen = tuple(
        group for group in wanted if _is_present(folder, group) and (group.is_model or not model_only)
    )
    if not chosen:
        patterns = ", ".join(pattern for group in wanted for pattern in group.files)
        raise ConfigError(f"check-golden: {folder} holds no cases to run; looked for {patterns}")
    return chosen


def check_family(folder: Path, family: str | None) -> None:
    """Refuse a family that no checkpoint of the folder has.

    Raises:
        ConfigError: no key in `ckpt/` starts with `family`.
    """
    keys = sorted(path.name for path in (folder / "ckpt").glob("*"))
    if family is not None and not any(key.startswith(family) for key in keys):
        raise ConfigError(f"--family is {family!r}, but the checkpoints are {', '.join(keys) or 'none'}")


def run_groups(
    folder: Path, groups: Sequence[Group], *, family: str | None, parallel: ParallelConfig | None = None
) -> Iterator[Row]:
    """Run groups one after the other.

    An exception inside a group becomes a failed row, with its traceback in the log, and the next group
    runs; under a parallel plan it is raised, because the other ranks would wait for this one.

    Args:
        folder: golden folder.
        groups: from `select_groups`.
        family: prefix of the checkpoint keys to run, None for all.
        parallel: plan of the model's groups; None runs them on this process alone.
    """
    for group in groups:
        run = _resolve(group, parallel)
        try:
            yield from run(folder, family=family)
        except Exception as error:
            if parallel is not None:
                raise
            logger.error("group %s stopped:\n%s", group.name, traceback.format_exc())
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Row(
                name=group.name,
                quantity="exception",
                error=None,
                tolerance=None,
                status="fail",
                detail=reason,
            )


def _resolve(group: Group, parallel: ParallelConfig | None) -> Callable[..., Iterator[Row]]:
    """Import late: a check of positions needs no megatron-core."""
    run = getattr(importlib.import_module(f"{__package__}.groups.{group.module}"), group.function)
    return functools.partial(run, parallel=parallel or ParallelConfig()) if group.is_model else run


def _is_present(folder: Path, group: Group) -> bool:
    return any(any(folder.glob(pattern)) for pattern in group.files)
