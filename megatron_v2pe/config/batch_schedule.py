"""How many packs a step has: a pure function of the step number.

    optim.global_batch_size | optim.global_batch_tokens / data.max_pack_tokens    packs of a step
    optim.batch_rampup [START, INCREMENT, PACKS]                                  fewer of them at first
                        --batch_schedule--> BatchSchedule: a level for every size, where it begins

A rank accumulates gradients over the packs of a step divided by the data parallel size, so that size must divide every
level. Learning rate and warm-up count steps, whatever their size.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.sections.rules import divisors, nearest_multiples
from megatron_v2pe.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Level:
    """Steps of equal size.

    Attributes:
        from_step: first of them, 0-based.
        from_pack: packs of all steps before it.
        size: packs of each step.
    """

    from_step: int
    from_pack: int
    size: int


@dataclass(frozen=True)
class BatchSchedule:
    """Sizes of all steps of a run.

    Attributes:
        levels: in order; each ends where the next begins, the last never.
    """

    levels: tuple[Level, ...]

    @property
    def full_size(self) -> int:
        """Packs of a step after the ramp-up."""
        return self.levels[-1].size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that a step may have, in order."""
        return tuple(level.size for level in self.levels)

    def size(self, step: int) -> int:
        """Packs of a step (0-based)."""
        return self._level(step).size

    def packs_before(self, step: int) -> int:
        """Packs of all steps before one (0-based)."""
        level = self._level(step)
        return level.from_pack + (step - level.from_step) * level.size

    def _level(self, step: int) -> Level:
        index = bisect.bisect_right(self.levels, step, key=lambda level: level.from_step)
        return self.levels[index - 1]

    @property
    def text(self) -> str:
        """`32 packs`, or `4 packs, 8 from step 26, ..., 32 from step 58` with steps counted from 1, as in metrics."""
        first, *rest = self.levels
        shown = rest if len(rest) <= 4 else [*rest[:2], None, rest[-1]]
        later = [f"{level.size} from step {level.from_step + 1}" if level else "..." for level in shown]
        return ", ".join([f"{first.size} packs", *later])


def constant_batches(size: int) -> BatchSchedule:
    """Every step has as many packs."""
    return BatchSchedule((Level(from_step=0, from_pack=0, size=size),))


def ramped_batches(*, start: int, increment: int, packs: int, size: int) -> BatchSchedule:
    """Megatron's `--rampup-batch-size START INCREMENT SAMPLES`, counted in packs.

    The `packs` are cut into as many equal parts as there are increments. A step is as large as the part says that its
    first pack lies in; after them all, it has the full size.

    Args:
        start: packs of the first step.
        increment: packs by which steps grow; must divide size - start.
        packs: over how many packs they grow.
        size: packs of a step after the ramp-up.
    """
    num_parts = (size - start) // increment
    levels: list[Level] = []
    step = used = 0
    while (part := used * num_parts // packs) < num_parts:
        level = Level(from_step=step, from_pack=used, size=start + part * increment)
        num_steps = math.ceil(((part + 1) * packs - used * num_parts) / (num_parts * level.size))
        step, used = step + num_steps, used + num_steps * level.size
        levels.append(level)
    return BatchSchedule((*levels, Level(from_step=step, from_pack=used, size=size)))


def batch_schedule(config: RunConfig) -> BatchSchedule:
    """Sizes of the steps of a run.

    Raises:
        ConfigError: tokens that are no whole packs, a ramp-up that does not end at the full size.
    """
    size = _full_size(config)
    if not config.optim.batch_rampup:
        return constant_batches(size)
    start, increment, packs = config.optim.batch_rampup
    where = f"optim.batch_rampup is {list(config.optim.batch_rampup)}, which starts at {start} packs"
    if start >= size:
        raise ConfigError(
            f"{where}, but a step has {size} in the end and there is nothing to grow; lower START, raise "
            "optim.global_batch_size or optim.global_batch_tokens, or omit the ramp-up"
        )
    if (size - start) % increment:
        raise ConfigError(
            f"{where} and adds {increment} at a time, but the step of {size} is {size - start} away, of which "
            f"INCREMENT must be a divisor: {divisors(size - start)}"
        )
    return ramped_batches(start=start, increment=increment, packs=packs, size=size)


def check_batches(config: RunConfig, *, dp: int) -> None:
    """Every step gives each data parallel rank as many packs as the others, in numbers that the schedule can run.

    Raises:
        ConfigError: with the nearest size that does.
    """
    parallel = config.parallel
    batches = batch_schedule(config)
    multiple = parallel.pp if parallel.vpp > 1 else 1
    for level in batches.levels:
        if level.size % dp:
            reason = f"but the {dp} data parallel ranks must divide it"
            raise ConfigError(_refusal(config, batches, level, reason, dp))
        if level.size // dp % multiple:
            reason = (
                f"which gives each data parallel rank {level.size // dp} micro batches, but the interleaved "
                f"schedule (parallel.vpp {parallel.vpp}) needs a multiple of parallel.pp = {multiple}"
            )
            raise ConfigError(_refusal(config, batches, level, reason, dp * multiple))


def _refusal(config: RunConfig, batches: BatchSchedule, level: Level, reason: str, divisor: int) -> str:
    optim = config.optim
    if optim.batch_rampup:
        return (
            f"optim.batch_rampup is {list(optim.batch_rampup)}: from step {level.from_step + 1} on a step has "
            f"{level.size} packs, {reason}; choose START, INCREMENT and the {batches.full_size} packs after the "
            f"ramp-up as multiples of {divisor}"
        )
    if optim.global_batch_tokens:
        tokens = nearest_multiples(optim.global_batch_tokens, divisor * config.data.max_pack_tokens)
        return (
            f"optim.global_batch_tokens is {optim.global_batch_tokens}, {level.size} packs of data.max_pack_tokens, "
            f"{reason}; nearest: {tokens}"
        )
    return f"optim.global_batch_size is {level.size}, {reason}; nearest: {nearest_multiples(level.size, divisor)}"


def _full_size(config: RunConfig) -> int:
    """Packs of a step after the ramp-up."""
    tokens, pack = config.optim.global_batch_tokens, config.data.max_pack_tokens
    if not tokens:
        return config.optim.global_batch_size or 1
    if tokens % pack:
        raise ConfigError(
            f"optim.global_batch_tokens is {tokens}, but packs of data.max_pack_tokens = {pack} must divide it; "
            f"nearest: {nearest_multiples(tokens, pack)}"
        )
    return tokens // pack
