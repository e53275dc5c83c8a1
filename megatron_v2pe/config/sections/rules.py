"""What the rules of all sections share: how a broken rule is reported, and the numbers that its message suggests."""

from __future__ import annotations

from megatron_v2pe.core.errors import ConfigError

_MOST_SHOWN = 8


def require(condition: bool, path: str, value: object, rule: str) -> None:
    """Refuse a field that breaks its rule.

    Raises:
        ConfigError: names the field, its value and the rule.
    """
    if not condition:
        raise ConfigError(f"{path} is {value!r}, but {rule}")


def require_local(value: str, path: str) -> None:
    """Refuse an address where a local folder is wanted; it may hold credentials, so it is not repeated.

    Raises:
        ConfigError: names the field and the scheme.
    """
    scheme, found, _ = value.partition("://")
    if found:
        raise ConfigError(
            f"{path} is an address ({scheme[:16]}://...), but must be a folder of a local or shared file system; "
            "give one, and copy results to the store when the run has ended"
        )


def divisors(number: int) -> str:
    """Divisors of a number for a message, the small ones: those are what a user wants."""
    found = [each for each in range(1, number + 1) if number % each == 0]
    return ", ".join(map(str, found[:_MOST_SHOWN])) + (", ..." if len(found) > _MOST_SHOWN else "")


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around a value, for a message."""
    below = value // divisor * divisor
    return " or ".join(str(size) for size in (below, below + divisor) if size)
