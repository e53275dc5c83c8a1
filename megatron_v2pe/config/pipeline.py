"""Which decoder layers each pipeline stage holds, as text: Megatron's layout notation.

    "Et*3|t*5|t*5|t*3L"      four stages; E embedding, vision and projector; t a decoder layer; L head and loss

With virtual stages there are pp * vpp of them, assigned to the ranks in turn: stage s is on pipeline rank s % pp.
"""

from __future__ import annotations

import re

from megatron_v2pe.core.errors import ConfigError

_TOKEN = re.compile(r"([EtL])(?:\*(\d+))?")


def expand_layout(layout: str) -> tuple[str, ...]:
    """Stages of a layout with repetitions written out.

    Example: "Et*2|tL" is ("Ett", "tL").

    Raises:
        ConfigError: a letter other than E, t, L, or a repetition of something else.
    """
    stages = []
    for stage in layout.split("|"):
        text, at = "", 0
        for match in _TOKEN.finditer(stage):
            if match.start() != at:
                break
            text, at = text + match[1] * int(match[2] or 1), match.end()
        if at != len(stage):
            raise ConfigError(
                f"parallel.pipeline_layout is {layout!r}, but {stage[at:]!r} is not understood; stages are separated "
                "by |, and hold E (embedding and vision), t (decoder layer, t*3 for three), L (head and loss)"
            )
        stages.append(text)
    return tuple(stages)


def check_layout(layout: str, *, num_stages: int, num_layers: int) -> None:
    """Check a layout against the plan and the model.

    Raises:
        ConfigError: wrong number of stages or layers, or E and L not at the ends.
    """
    stages = expand_layout(layout)
    where = f"parallel.pipeline_layout is {layout!r}"
    if len(stages) != num_stages:
        raise ConfigError(
            f"{where}, which has {len(stages)} stages, but parallel.pp x parallel.vpp = {num_stages}; give one stage "
            "for each"
        )
    count = sum(stage.count("t") for stage in stages)
    if count != num_layers:
        raise ConfigError(f"{where}, which has {count} decoder layers, but the model has {num_layers}")
    joined = "|".join(stages)
    if not joined.startswith("E") or not joined.endswith("L") or joined.count("E") + joined.count("L") != 2:
        raise ConfigError(f"{where}, but must have E once, first, and L once, last")


def split_layers(num_layers: int, *, num_stages: int) -> str:
    """A layout for layers that do not divide, the longer stages first; empty where they do.

    Example: 3 layers on 2 stages are "Ett|tL".
    """
    if num_layers % num_stages == 0:
        return ""
    short, num_longer = divmod(num_layers, num_stages)
    stages = ["t" * (short + (stage < num_longer)) for stage in range(num_stages)]
    return f"E{'|'.join(stages)}L"
