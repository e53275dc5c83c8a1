"""`config.yaml` of a run folder: the settings of its last start, and what the next start changes.

    config.yaml of the last start --compare--> one line of the log for each field that a resumed run changed
    settings of this start ---------write----> config.yaml, once nothing can be refused any more

A start that is refused leaves the file alone: it says what the checkpoints beside it were trained with.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron_v2pe.config.load import dump_run_config, load_run_config
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.files import write_atomic

logger = logging.getLogger(__name__)

FILE = "config.yaml"


def write_config_snapshot(run_dir: Path, config: RunConfig, *, is_resumed: bool) -> None:
    """Log what changed since the last start, when the run continues from it, and keep the settings of this one.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / FILE
    if is_resumed and path.exists():
        try:
            changed = changes(load_run_config(path), config)
        except ConfigError as error:  # of another version of this program, or written by hand
            logger.warning("what changed since the last start is not known: %s", error)
        else:
            for line in changed:
                logger.info("changed since the last start: %s", line)
    write_atomic(path, dump_run_config(config))


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """`section.key: then -> now` of every field that differs, in the order of the schema."""
    found = []
    for section in dataclasses.fields(RunConfig):
        old, new = getattr(before, section.name), getattr(now, section.name)
        for field in dataclasses.fields(old):
            then, value = getattr(old, field.name), getattr(new, field.name)
            if then != value:
                found.append(f"{section.name}.{field.name}: {then!r} -> {value!r}")
    return found
