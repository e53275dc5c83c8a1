"""Changes of a configuration that cost or save memory, as the overrides that a user would type.

    out of memory --advise--> parallel.cp=8 model.recompute=full      step 1.2x as long, 9 GiB to spare

A change is tried on the whole run; what `config.validate` refuses is not offered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig, VisionConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.planning.estimate import Estimate

Override = tuple[str, str, Any]
"""Section, key, value."""

Evaluate = Callable[[RunConfig], Estimate]
MAX_ROUNDS = 8
ADVISED_RANK = 16
"""Of adapters of the language model, as in the recipe for one GPU of 24 GB."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Overrides, and the run with them."""

    overrides: tuple[Override, ...]
    estimate: Estimate

    @property
    def text(self) -> str:
        """As on a command line."""
        return " ".join(map(override_text, self.overrides))


def override_text(override: Override) -> str:
    """`section.key=value` as YAML reads it."""
    section, key, value = override
    return f"{section}.{key}={str(value).lower() if isinstance(value, bool) else value}"


def changed(config: RunConfig, overrides: tuple[Override, ...]) -> RunConfig:
    """A configuration with overrides, all of a section at once, because its rules read several fields.

    Raises:
        ConfigError: a rule of a section.
    """
    for section in dict.fromkeys(name for name, _, _ in overrides):
        values = {key: value for name, key, value in overrides if name == section}
        part = dataclasses.replace(getattr(config, section), **values)
        config = dataclasses.replace(config, **{section: part})
    return config


def memory_savings(config: RunConfig) -> Iterator[tuple[Override, ...]]:
    """Single steps towards less memory from a configuration."""
    yield from _decoder_savings(config.model)
    yield from _tower_savings(config.vision)
    yield from _layout_savings(config.parallel)


def _decoder_savings(model: ModelConfig) -> Iterator[tuple[Override, ...]]:
    if model.recompute == "none":
        yield (("model", "recompute", "selective"),)
    if model.recompute != "full":
        yield (("model", "recompute", "full"),)
    if model.recompute != "none" and model.mlp_chunks < 8:
        yield (("model", "mlp_chunks", 8 if model.mlp_chunks >= 4 else 4),)
    if model.recompute == "full" and not model.offload_activations:
        yield (("model", "offload_activations", True),)
    if model.loss_chunk_tokens > 1024:
        yield (("model", "loss_chunk_tokens", 1024),)


def _tower_savings(vision: VisionConfig) -> Iterator[tuple[Override, ...]]:
    if vision.recompute == "none":
        yield (("vision", "recompute", "full"),)
    if vision.micro_batch_tiles == 0 or vision.micro_batch_tiles > 8:
        yield (("vision", "micro_batch_tiles", 16 if vision.micro_batch_tiles == 0 else 8),)


def _layout_savings(parallel: ParallelConfig) -> Iterator[tuple[Override, ...]]:
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield (("parallel", "sequence_parallel", True),)
    if parallel.tp > 1 and parallel.vision == "replicated":
        yield (("parallel", "vision", "tensor"),)
    yield (("parallel", "cp", parallel.cp * 2),)
    yield (("parallel", "tp", parallel.tp * 2), ("parallel", "sequence_parallel", True))
    if not parallel.pipeline_layout:
        yield (("parallel", "pp", parallel.pp * 2),)


def time_savings(config: RunConfig) -> Iterator[tuple[Override, ...]]:
    """Single steps towards less time, where there is memory to spare."""
    model, vision = config.model, config.vision
    if model.offload_activations:
        yield (("model", "offload_activations", False),)
    elif model.recompute == "full":
        yield (("model", "recompute", "selective"),)
        yield (("model", "recompute", "none"), ("model", "mlp_chunks", 1))
    elif model.recompute == "selective":
        yield (("model", "recompute", "none"), ("model", "mlp_chunks", 1))
    if model.mlp_chunks > 1:
        yield (("model", "mlp_chunks", 1),)
    if vision.micro_batch_tiles:
        yield (("vision", "micro_batch_tiles", 0),)
    elif vision.recompute != "none":
        yield (("vision", "recompute", "none"),)


def try_changes(
    config: RunConfig, steps: Iterator[tuple[Override, ...]], evaluate: Evaluate
) -> list[Variant]:
    """Estimates of a configuration after each of some changes; invalid ones are left out."""
    found = []
    for overrides in steps:
        try:
            found.append(Variant(overrides=overrides, estimate=evaluate(changed(config, overrides))))
        except ConfigError:
            continue
    return found


def merged(first: tuple[Override, ...], second: tuple[Override, ...]) -> tuple[Override, ...]:
    """Both, the later value of a key."""
    values = {(section, key): value for section, key, value in (*first, *second)}
    return tuple((section, key, value) for (section, key), value in values.items())


def advise(config: RunConfig, evaluate: Evaluate) -> Variant | None:
    """Changes after which a run fits: each round the fastest that does, or else the one that saves most for its time.

    Returns:
        None when no sequence of up to 8 changes fits.
    """
    current = Variant(overrides=(), estimate=evaluate(config))
    for _ in range(MAX_ROUNDS):
        here = changed(config, current.overrides)
        found = [
            Variant(overrides=merged(current.overrides, variant.overrides), estimate=variant.estimate)
            for variant in try_changes(here, memory_savings(here), evaluate)
        ]
        fitting = [variant for variant in found if variant.estimate.fits]
        if fitting:
            return min(fitting, key=lambda variant: variant.estimate.time.seconds)
        smaller = [variant for variant in found if variant.estimate.room_bytes > current.estimate.room_bytes]
        if not smaller:
            return None
        before = current.estimate
        current = max(smaller, key=lambda variant: _worth(variant.estimate, before))
    return None


def train_less(config: RunConfig, evaluate: Evaluate) -> list[Variant]:
    """Runs that train less of the model and fit, with what `advise` adds; those that keep most in training first.

    Each is a run of another kind, so it is offered only where no change of the layout makes the whole fit.
    """
    found = []
    for overrides in _smaller_trainings(config):
        try:
            smaller = changed(config, overrides)
            estimate = evaluate(smaller)
            more = None if estimate.fits else advise(smaller, evaluate)
        except ConfigError:
            continue
        if more is not None:
            found.append(Variant(overrides=merged(overrides, more.overrides), estimate=more.estimate))
        elif estimate.fits:
            found.append(Variant(overrides=overrides, estimate=estimate))
    return found


def _smaller_trainings(config: RunConfig) -> Iterator[tuple[Override, ...]]:
    """The tower frozen; adapters on the language model beside the projector; adapters alone."""
    if config.lora.is_on:
        return
    tower: tuple[Override, ...] = (("vision", "freeze", True),)
    if not config.vision.freeze and not (config.model.freeze_language and config.model.freeze_projector):
        yield tower
    if config.model.freeze_language:
        return
    # Checkpoints of adapters name their base by hashes, which a Hugging Face folder does not have.
    imported: tuple[Override, ...] = (("model", "hf_path", ""), ("model", "checkpoint", "IMPORTED"))
    base = imported if config.model.hf_path else ()
    adapters = (*base, *tower, ("lora", "language_rank", ADVISED_RANK))
    if not config.model.freeze_projector:
        yield adapters
    yield (*adapters, ("model", "freeze_projector", True))


def _worth(after: Estimate, before: Estimate) -> float:
    """Bytes saved, divided by how much longer a step then is."""
    return (after.room_bytes - before.room_bytes) * before.time.seconds / after.time.seconds


def relax(config: RunConfig, evaluate: Evaluate) -> Variant | None:
    """The single change that makes a fitting run at least 3 % faster and still fit, if there is one."""
    now = evaluate(config).time.seconds
    found = [
        variant
        for variant in try_changes(config, time_savings(config), evaluate)
        if variant.estimate.fits and variant.estimate.time.seconds < 0.97 * now
    ]
    return min(found, key=lambda variant: variant.estimate.time.seconds, default=None)
