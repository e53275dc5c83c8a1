"""Bad lines by cause: a thousand missing pictures are one sentence and a list of places.

a.jsonl:3: x.png: no such image     a.jsonl:9: y.png: no such image     ->     the first message, "alike: a.jsonl:9"
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_v2pe.data.index.rows import BadSample

_MOST_CAUSES = 20
_MOST_PLACES = 8
# What differs between two lines that went bad for one reason: names of files, what was found, numbers.
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/.]\S*[/.:]|\b[\d,.]*\d")


def cause_of(sample: BadSample) -> str:
    """What lines that went bad for one reason have in common."""
    place = place_of(sample)
    text = sample.message.removeprefix(f"{place}:").removeprefix(f"{place}.")
    return f"{sample.kind} {_VARYING.sub('*', text)}"


def place_of(sample: BadSample) -> str:
    """`file:line`, with which the message of a bad line begins."""
    found = re.match(rf".*?:{sample.line_number}\b", sample.message)
    return found.group() if found else sample.sample_id


def by_cause(samples: Sequence[BadSample]) -> list[list[BadSample]]:
    """Bad lines that went bad for one reason, the commonest first; in the order of the files among themselves."""
    groups: dict[str, list[BadSample]] = {}
    for sample in samples:
        groups.setdefault(cause_of(sample), []).append(sample)
    return sorted(groups.values(), key=len, reverse=True)


def cause_lines(samples: Sequence[BadSample]) -> list[str]:
    """Each cause with the message of its first line, and the places of the next ones."""
    groups = by_cause(samples)
    lines = []
    for group in groups[:_MOST_CAUSES]:
        lines.append(group[0].message)
        if len(group) > 1:
            places = ", ".join(place_of(sample) for sample in group[1 : 1 + _MOST_PLACES])
            more = ", ..." if len(group) > 1 + _MOST_PLACES else ""
            lines.append(f"  and {len(group) - 1:,} more of this kind: {places}{more}")
    if len(groups) > _MOST_CAUSES:
        rest = groups[_MOST_CAUSES:]
        lines.append(f"and {sum(map(len, rest)):,} for {len(rest):,} other reasons")
    return lines
