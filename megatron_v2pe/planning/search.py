"""The best layouts of a run on a number of GPUs: every split of the axes, each with the least saving that fits.

    tp x pp x cp (x vpp, tower split, a2a)  --for each: recompute, MLP chunks, tile slices, offload--> fits?
                                            --> by predicted time

What `config.validate` refuses is left out. Batch, data, frozen parts and precision stay as the run has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.pipeline import split_layers
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.planning.changes import Evaluate, Override, Variant, changed
from megatron_v2pe.planning.request.hardware import Hardware

DECODER_SAVINGS: tuple[tuple[Override, ...], ...] = tuple(
    (
        ("model", "recompute", recompute),
        ("model", "mlp_chunks", model_chunks),
        ("model", "offload_activations", offload),
    )
    for recompute, model_chunks, offload in (
        ("none", 1, False),
        ("selective", 1, False),
        ("selective", 4, False),
        ("full", 1, False),
        ("full", 4, False),
        ("full", 4, True),
    )
)
TOWER_SAVINGS: tuple[tuple[Override, ...], ...] = tuple(
    (("vision", "recompute", recompute), ("vision", "micro_batch_tiles", tiles))
    for recompute, tiles in (("none", 0), ("full", 0), ("none", 16))
)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**exponent for exponent in range(most.bit_length()) if 2**exponent <= most]


def splits(arch: InternVLArchitecture, gpus: int, hardware: Hardware) -> Iterator[tuple[Override, ...]]:
    """Sizes of the axes: tp inside a node, pp up to one layer a stage, the rest over cp and dp.

    Sequence parallelism always comes with tp: it saves memory and costs nothing here.
    """
    layers = arch.language.num_layers
    for tp, pp in product(powers_of_two(min(hardware.gpus_per_node, gpus)), powers_of_two(min(gpus, layers))):
        for cp in powers_of_two(gpus // (tp * pp)):
            for vpp, tower, comm in product(
                (1, 2) if pp > 1 else (1,),
                ("replicated", "tensor") if tp > 1 else ("replicated",),
                ("p2p", "a2a") if cp > 1 else ("p2p",),
            ):
                yield tuple(
                    ("parallel", key, value)
                    for key, value in (
                        ("tp", tp),
                        ("pp", pp),
                        ("cp", cp),
                        ("vpp", vpp),
                        ("sequence_parallel", tp > 1),
                        ("vision", tower),
                        ("cp_comm_type", comm),
                        ("pipeline_layout", split_layers(layers, num_stages=pp * vpp)),
                    )
                )


def search(
    config: RunConfig, arch: InternVLArchitecture, evaluate: Evaluate, *, gpus: int, hardware: Hardware
) -> list[Variant]:
    """Layouts that fit, the fastest first; where none fits, the ones that come nearest, by what they lack.

    Raises:
        ConfigError: no layout is valid for this model, batch and number of GPUs.
    """
    fitting: list[Variant] = []
    lacking: list[Variant] = []
    for axes in splits(arch, gpus, hardware):
        variant = best_savings(config, (*axes, *_sharding(config, axes)), evaluate)
        if variant is not None:
            (fitting if variant.estimate.fits else lacking).append(variant)
    if not fitting and not lacking:
        raise ConfigError(
            f"--search: no split of {gpus} GPUs is valid for this model with steps of {batch_schedule(config).text} "
            "(optim.global_batch_size); the data parallel size must divide it"
        )
    if not fitting:
        return sorted(lacking, key=lambda variant: -variant.estimate.room_bytes)
    return sorted(fitting, key=lambda variant: variant.estimate.time.seconds)


def _sharding(config: RunConfig, axes: tuple[Override, ...]) -> tuple[Override, ...]:
    """The run's `parallel.cp_sharding`, and zigzag where the axes know no other."""
    sizes = {key: value for _, key, value in axes}
    is_kept = sizes["cp"] > 1 and sizes["cp_comm_type"] == "p2p"
    return () if is_kept else (("parallel", "cp_sharding", "zigzag"),)


def best_savings(config: RunConfig, axes: tuple[Override, ...], evaluate: Evaluate) -> Variant | None:
    """The fastest combination of savings that fits a split, or the smallest one; None for an invalid split.

    The largest savings are tried first: where they do not fit, nothing does.
    """
    smallest = _evaluated(config, (*axes, *DECODER_SAVINGS[-1], *TOWER_SAVINGS[-1]), evaluate)
    if smallest is None or not smallest.estimate.fits:
        return smallest
    best = smallest
    for tower in TOWER_SAVINGS:
        for decoder in DECODER_SAVINGS:
            variant = _evaluated(config, (*axes, *decoder, *tower), evaluate)
            if variant is None or not variant.estimate.fits:
                continue
            if variant.estimate.time.seconds < best.estimate.time.seconds:
                best = variant
            break  # further savings cost more time
    return best


def _evaluated(config: RunConfig, overrides: tuple[Override, ...], evaluate: Evaluate) -> Variant | None:
    try:
        return Variant(overrides=overrides, estimate=evaluate(changed(config, overrides)))
    except ConfigError:
        return None


def in_fp8(config: RunConfig, best: Variant, evaluate: Evaluate) -> Variant | None:
    """The best layout with FP8 linears, where they can work, fit and are faster.

    They round the decoder's products to 8 bits, so a search keeps `model.fp8` as the run has it, and this is offered
    beside its rows.
    """
    if config.model.fp8 != "none":
        return None
    variant = _evaluated(config, (*best.overrides, ("model", "fp8", "current")), evaluate)
    if variant is None or not variant.estimate.fits:
        return None
    return variant if variant.estimate.time.seconds < best.estimate.time.seconds else None


def shown_overrides(variant: Variant, config: RunConfig) -> tuple[Override, ...]:
    """Those that differ from the run, and those that differ from the defaults, so that a row says its layout."""
    defaults = RunConfig()
    return tuple(
        (section, key, value)
        for section, key, value in variant.overrides
        if getattr(getattr(defaults, section), key) != value
        or getattr(getattr(config, section), key) != value
    )
