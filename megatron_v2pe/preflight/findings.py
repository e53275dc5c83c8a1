"""What a check found, joined over ranks, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megatron_v2pe.core.errors import V2PEError
from megatron_v2pe.core.text_table import text_table

Verdict = Literal["go", "note", "no-go"]
_ORDER: tuple[Verdict, ...] = ("go", "note", "no-go")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table.

    Attributes:
        name: what was checked.
        verdict: `go`; `note` for what a person should know; `no-go` for what would stop the run.
        text: what was found, with its number and what was expected.
    """

    name: str
    verdict: Verdict
    text: str


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check without collectives; a mistake that it raises is its finding."""
    try:
        return check()
    except (V2PEError, OSError) as error:
        return Finding(name=name, verdict="no-go", text=str(error))


def worst_over_ranks(finding: Finding) -> Finding:
    """The worst of all ranks' findings of one check, the first rank's among equals. Collective."""
    found: list[Finding] = [finding] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    ranks = [rank for rank, each in enumerate(found) if each.verdict == worst_verdict(found)]
    chosen = found[ranks[0]]
    if chosen.verdict == "go" or len(found) == 1:
        return chosen
    where = f"rank {ranks[0]}" if len(ranks) == 1 else f"rank {ranks[0]} and {len(ranks) - 1} more"
    return Finding(name=chosen.name, verdict=chosen.verdict, text=f"{where}: {chosen.text}")


def worst_verdict(findings: Iterable[Finding]) -> Verdict:
    """The worst verdict."""
    return max((each.verdict for each in findings), key=_ORDER.index)


def findings_table(findings: Sequence[Finding], *, ranks: int, seconds: float) -> str:
    """Lines for people; the last one is the answer."""
    lines = text_table(None, [(each.verdict, each.name, each.text) for each in findings], align="<")
    answer = "NO-GO" if worst_verdict(findings) == "no-go" else "GO"
    world = "1 rank" if ranks == 1 else f"{ranks} ranks"
    return "\n".join([*lines, f"{answer}: {world}, checked in {seconds:.0f} s"]) + "\n"
