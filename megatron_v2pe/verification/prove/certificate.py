"""One page about a proof: what ran, how far from one rank, which mistakes were caught, and what it does not say."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from megatron_v2pe.config.schema import ParallelConfig
from megatron_v2pe.verification.prove.layout import ProvenLayout
from megatron_v2pe.verification.prove.mutations import CAUGHT, MUTATIONS

FLOAT64 = {"loss": 1e-12, "gradient": 1e-11}
"""Thousands of roundings (1.1e-16); the smallest mistake, one wrong token, is a million times larger."""
FLOAT32 = {"loss": 1e-6, "norm": 3e-6, "gradient": 1e-5, "weight 1": 3e-4, "weight 2": 3e-4}
"""Those of the parity matrix (docs/numerics.md), for sums of up to `TERMS` tokens."""
TERMS = 400
NOT_PROVEN = (
    "kernels of a GPU and of Transformer Engine (`megatron-v2pe preflight` on the machine compares attention there)",
    "rounding in bfloat16, and true widths and depths (`megatron-v2pe verify-numerics` compares true weights)",
    "that the data are what they should be (`megatron-v2pe show-sample`)",
)

Errors = dict[str, tuple[float, str]]


def tolerances(max_pack_tokens: int) -> dict[str, dict[str, float]]:
    """Limits by dtype and quantity; those of float32 grow with the root of the tokens that sums run over."""
    growth = math.sqrt(max(1.0, max_pack_tokens / TERMS))
    return {"float64": FLOAT64, "float32": {name: limit * growth for name, limit in FLOAT32.items()}}


def worst(by_rank: Sequence[Mapping[str, Any]]) -> Errors:
    """The largest error of each quantity over ranks, with where it is; what is not finite counts as infinite."""
    found: Errors = {}
    for errors in by_rank:
        for name, (error, where) in errors.items():
            size = error if math.isfinite(error) else math.inf
            found[name] = max(found.get(name, (-1.0, "")), (size, where))
    return found


@dataclass(frozen=True, kw_only=True)
class Caught:
    """How clearly a mutation was seen: the quantity whose error is the most times its tolerance."""

    name: str
    quantity: str
    error: float
    times: float

    @property
    def is_caught(self) -> bool:
        """Whether that is enough."""
        return self.times >= CAUGHT


def clearest(name: str, errors: Errors, limits: Mapping[str, float]) -> Caught:
    """Where a mutation shows most."""
    times = {quantity: error / limits[quantity] for quantity, (error, _) in errors.items()}
    quantity = max(times, key=lambda each: times[each])
    return Caught(name=name, quantity=quantity, error=errors[quantity][0], times=times[quantity])


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a proof found.

    Attributes:
        facts: name -> value of what ran: run file, digests, versions, model, data.
        run: section `parallel` of the run.
        layout: what ran instead.
        notes: what differs from the run.
        errors: dtype -> quantity -> (error, where).
        limits: dtype -> quantity -> tolerance.
        not_compared: parameters of which not every element was compared.
        caught: mutations that ran.
        left_out: mutations that this layout cannot have -> what it would need.
        seconds: of all.
    """

    facts: Mapping[str, str]
    run: ParallelConfig
    layout: ProvenLayout
    notes: Sequence[str]
    errors: Mapping[str, Errors]
    limits: Mapping[str, Mapping[str, float]]
    not_compared: Sequence[str]
    caught: Sequence[Caught]
    left_out: Mapping[str, str]
    seconds: float

    @property
    def is_equal(self) -> bool:
        """Every error is within its tolerance, and nothing went uncompared."""
        is_within = all(
            error <= self.limits[dtype][name]
            for dtype, errors in self.errors.items()
            for name, (error, _) in errors.items()
        )
        return is_within and not self.not_compared

    @property
    def is_proven(self) -> bool:
        """Equal, and every mutation was caught."""
        return self.is_equal and all(each.is_caught for each in self.caught)

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        if not self.is_equal:
            return "NOT PROVEN: this layout does not give the numbers of one rank."
        missed = [each.name for each in self.caught if not each.is_caught]
        if missed:
            return f"NOT PROVEN: the numbers are one rank's, but would be with these mistakes too: {', '.join(missed)}."
        return (
            "PROVEN: this layout gives the loss and every gradient of one rank, and "
            f"{len(self.caught)} of {len(self.caught)} seeded mistakes were caught."
        )

    def markdown(self) -> str:
        """The page."""
        parts = [
            "# Certificate of a parallel layout",
            f"**{self.verdict}**",
            _table(["", ""], [[name, value] for name, value in self.facts.items()]),
            "## Layout",
            _table(["axis", "run", "proven"], self._layout_rows()),
            "\n".join(f"- {note}" for note in self.notes),
            "## Against one rank",
            "Largest relative error over all ranks and parameters: losses to themselves, a gradient to its largest "
            "entry, weights to their largest change. Every element of every parameter was compared on every rank that "
            "holds it.",
            _table(["dtype", "quantity", "error", "tolerance", "where"], self._error_rows()),
            *([f"Not compared: {', '.join(self.not_compared)}"] if self.not_compared else []),
            "## Seeded mistakes",
            f"Each was put into the running ranks; caught means an error of {CAUGHT:.0f} times its tolerance or more.",
            _table(["mistake", "shows in", "error", "times tolerance", ""], self._mutation_rows()),
            "## What this does not say",
            "\n".join(f"- {text}" for text in NOT_PROVEN),
        ]
        return "\n\n".join(part for part in parts if part) + f"\n\n{self.seconds:.0f} s.\n"

    def _layout_rows(self) -> list[list[str]]:
        names = [
            each.name
            for each in dataclasses.fields(ParallelConfig)
            if getattr(self.run, each.name) != each.default
            or getattr(self.layout.parallel, each.name) != each.default
        ]
        rows = [[name, getattr(self.run, name), getattr(self.layout.parallel, name)] for name in names]
        return [[str(cell) for cell in row] for row in [*rows, ["dp", "of the launch", self.layout.dp]]]

    def _error_rows(self) -> list[list[str]]:
        return [
            [dtype, name, _figure(error), f"{self.limits[dtype][name]:.1e}", where]
            for dtype, errors in self.errors.items()
            for name, (error, where) in errors.items()
        ]

    def _mutation_rows(self) -> list[list[str]]:
        ran = [
            [
                each.name,
                each.quantity,
                _figure(each.error),
                f"{each.times:.1e}",
                "caught" if each.is_caught else "MISSED",
            ]
            for each in self.caught
        ]
        return [
            *ran,
            *([name, "", "", "", f"cannot be: needs {needs}"] for name, needs in self.left_out.items()),
        ]

    def as_json(self) -> dict[str, Any]:
        """The same for programs; what is not finite is null."""
        return {
            "verdict": self.verdict,
            "is_proven": self.is_proven,
            "facts": dict(self.facts),
            "run": dataclasses.asdict(self.run),
            "layout": dataclasses.asdict(self.layout),
            "notes": list(self.notes),
            "errors": {
                dtype: {
                    name: {"error": _finite(error), "tolerance": self.limits[dtype][name], "where": where}
                    for name, (error, where) in errors.items()
                }
                for dtype, errors in self.errors.items()
            },
            "not_compared": list(self.not_compared),
            "mutations": [
                {
                    "name": each.name,
                    "quantity": each.quantity,
                    "error": _finite(each.error),
                    "times_tolerance": _finite(each.times),
                    "is_caught": each.is_caught,
                }
                for each in self.caught
            ],
            "left_out": dict(self.left_out),
            "not_proven": list(NOT_PROVEN),
            "seconds": round(self.seconds, 1),
        }


def machine_facts() -> dict[str, str]:
    """Versions and machine, for the page."""
    import torch

    from megatron_v2pe import __version__
    from megatron_v2pe.core.env import numeric_environment

    mcore = version("megatron-core")
    facts = {
        "versions": f"megatron_v2pe {__version__}, megatron-core {mcore}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}, CPU",
    }
    variables = numeric_environment()
    if variables:
        facts["environment"] = ", ".join(f"{name}={value}" for name, value in variables.items())
    return facts


def left_out(applied: Sequence[str]) -> dict[str, str]:
    """Mutations that do not apply, and what they need."""
    return {name: mutation.needs for name, mutation in MUTATIONS.items() if name not in applied}


def _figure(error: float) -> str:
    return "not finite" if not math.isfinite(error) else "0" if error == 0 else f"{error:.1e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
