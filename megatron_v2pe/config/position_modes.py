"""Names of the position modes: ours, and the release's (`rope_pos_id_version` of a config.json)."""

from __future__ import annotations

from typing import Literal

PositionMode = Literal["default", "v2pe_fixed", "v2pe_random"]

RELEASE_NAMES: dict[PositionMode, str] = {
    "default": "default",
    "v2pe_fixed": "v2pe_fix",
    "v2pe_random": "v2pe_rnd",
}
# What may be written in a YAML or a config.json.
POSITION_MODES: dict[str, PositionMode] = {
    **{release: mode for mode, release in RELEASE_NAMES.items()},
    **{mode: mode for mode in RELEASE_NAMES},
}
