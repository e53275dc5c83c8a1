"""Sizes of files as people write them."""

from __future__ import annotations

from megatron_v2pe.core.errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500MiB"."""
    unit = text.lstrip("0123456789")
    digits = text.removesuffix(unit)
    if unit not in _UNITS or not digits or int(digits) == 0:
        raise ConfigError(
            f"--max-shard-size is {text!r}, must be a whole number and one of {', '.join(_UNITS)}"
        )
    return int(digits) * _UNITS[unit]
