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


def require_local(path: str, value: object) -> None:
    """Refuse `s3://...` where a path is meant, which would make a local folder of that name.

    The address is not repeated: it may carry credentials, and logs and config.yaml are kept.

    Raises:
        ConfigError: names the field and the scheme.
    """
    if isinstance(value, str) and "://" in value:
        scheme = value.partition("://")[0]
        raise ConfigError(
            f"{path} is an address ({scheme[:16]}://...), but must be a path of a local or shared file system; mount "
            "the store, or copy what is there. Files that the meta json names may be addresses, with credentials where "
            "the storage library looks for them"
        )


def divisors(number: int) -> str:
    """Divisors of a number for a message, the small ones: those are what a user wants."""
    found = [each for each in range(1, number + 1) if number % each == 0]
    return ", ".join(map(str, found[:_MOST_SHOWN])) + (", ..." if len(found) > _MOST_SHOWN else "")


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around a value, for a message."""
    below = value // divisor * divisor
    return " or ".join(str(size) for size in (below, below + divisor) if size)
