"""A json object of a checkpoint's config.json that names itself in errors; its values are typed and bounded."""

from __future__ import annotations

import difflib
from typing import Any

from megatron_v2pe.config.arch.json_values import read_value
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.core.excerpt import shortened


class Section:
    """One object of a config.json.

    Args:
        values: the object.
        path: file and place in it, for messages.
    """

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self._values, self.path = values, path

    @property
    def values(self) -> dict[str, Any]:
        """The object itself."""
        return self._values

    def with_defaults(self, defaults: dict[str, Any]) -> Section:
        """The object with values for keys that it does not have; null counts as absent."""
        given = {
            key: value for key, value in self._values.items() if value is not None or key not in defaults
        }
        return Section({**defaults, **given}, self.path)

    def need(self, key: str) -> Any:
        """A value that must be there, as `json_values.VALUES` has it."""
        if self._values.get(key) is None:
            state = "null" if key in self._values else "missing"
            raise CheckpointError(
                f"{self.path}: key {key!r} is {state}; is this the config.json of an InternVL?"
            )
        return self._read(key, self._values[key])

    def get(self, key: str, default: Any) -> Any:
        """A value, as `json_values.VALUES` has it; null counts as absent."""
        value = self._values.get(key)
        return default if value is None else self._read(key, value)

    def _read(self, key: str, value: Any) -> Any:
        try:
            return read_value(key, value)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    def choice(self, key: str, default: Any, allowed: tuple[Any, ...]) -> Any:
        """A value that must be one of a few."""
        value = self.get(key, default)
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise CheckpointError(f"{self.path}: {key} is {shortened(value)}, known values are {known}")
        return value

    def section(self, key: str) -> Section:
        """An object that must be there."""
        value = self.need(key)
        return Section(value, f"{self.path}: {key}")

    def whole(self, key: str, default: int | None) -> int:
        """A whole number of at least 1; one that must be there when `default` is None."""
        value = self.need(key) if default is None else self.get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self.path}: {key} is {shortened(value)}, but must be a whole number of at least 1"
            )
        return value

    def refuse_unknown(self, known: set[str]) -> None:
        """Every key is one of `known`; the nearest one is named otherwise."""
        for key in self._values:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                hint = (
                    f"; did you mean {close[0]}?" if close else f"; known keys are {', '.join(sorted(known))}"
                )
                raise CheckpointError(f"{self.path}: unknown key {shortened(key)}{hint}")
