"""Who waited for whom when a run hung, from what its ranks' watchdogs wrote.

    stacks/rank_*.jsonl --lines of one moment--> Hang --> "hang at step 7: ranks 0, 2 wait in all_reduce (...), ..."

Ranks that hang together give up within seconds of each other. One that wrote nothing then was stopped or lost: its own
watchdog did not run either, and its last heartbeat, which the others wrote down, says in which step that was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_v2pe.core.jsonl import read_jsonl

_SAME_HANG_SECONDS = 15.0  # the launcher ends the ranks that have not given up by then
_SHOWN_SILENT = 4


@dataclass(frozen=True, kw_only=True)
class Hang:
    """One hang.

    Attributes:
        step: that was not done; the lowest where ranks differ.
        waiting: collective and source line, to the ranks that waited there; most ranks first.
        elsewhere: call and source line, to the ranks that were there.
        silent: ranks that wrote nothing, to what is known of them.
    """

    step: int
    waiting: Mapping[str, tuple[int, ...]]
    elsewhere: Mapping[str, tuple[int, ...]]
    silent: Mapping[int, str]

    def __str__(self) -> str:
        parts = [
            f"{_named(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {place}"
            for place, ranks in self.waiting.items()
        ]
        parts += [
            f"{_named(ranks)} {'are' if len(ranks) > 1 else 'is'} elsewhere, at {place}"
            for place, ranks in self.elsewhere.items()
        ]
        parts += [
            f"{_named((rank,))} is silent{known}" for rank, known in list(self.silent.items())[:_SHOWN_SILENT]
        ]
        if len(self.silent) > _SHOWN_SILENT:
            parts.append(f"{len(self.silent) - _SHOWN_SILENT} more are silent")
        return f"hang at step {self.step}: {', '.join(parts)}"


def read_hangs(run_dir: str | Path) -> tuple[Hang, ...]:
    """The hangs of a run, oldest first.

    Raises:
        DataError: a line is not json.
    """
    files = sorted(Path(run_dir).glob("stacks/rank_*.jsonl"))
    lines = sorted((line for file in files for _, line in read_jsonl(file)), key=lambda line: line["time"])
    groups: list[list[dict[str, Any]]] = []
    for line in lines:
        if not groups or line["time"] - groups[-1][0]["time"] > _SAME_HANG_SECONDS:
            groups.append([])
        groups[-1].append(line)
    return tuple(_hang(group) for group in groups)


def _hang(lines: Sequence[Mapping[str, Any]]) -> Hang:
    spoke = {line["rank"] for line in lines}
    silent = dict.fromkeys((rank for rank in range(lines[0]["world_size"]) if rank not in spoke), "")
    for last in (last for line in lines for last in line["silent"]):
        if last["rank"] in silent:
            silent[last["rank"]] = f", last heard of in step {last['step']} on {last['host']}"
    return Hang(
        step=min(line["step"] for line in lines),
        waiting=_by_place([line for line in lines if line["is_waiting"]]),
        elsewhere=_by_place([line for line in lines if not line["is_waiting"]]),
        silent=silent,
    )


def _by_place(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
    places: dict[str, list[int]] = {}
    for line in lines:
        within = f", from {line['within']}" if line["within"] else ""
        places.setdefault(f"{line['call']} ({line['at']}{within})", []).append(line["rank"])
    return {
        place: tuple(sorted(ranks)) for place, ranks in sorted(places.items(), key=lambda item: -len(item[1]))
    }


def _named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    each = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(each)}"
