"""FP8 linears of the decoder (`model.fp8`): what they ask of a run, and where they cannot work.

    recipe      scales                                                    rows of a rank, channels: multiples of
    current     one for each tensor, from the tensor itself               16
    blockwise   one for 128 x 128 weights, for 128 entries of a row       128

Both keep nothing between steps, so a resumed run needs nothing more of a checkpoint; delayed scaling, which keeps a
history of largest entries, is not offered. Rows that are missing to the multiple are padding of a pack's last document.
"""

from __future__ import annotations

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError

FP8_MULTIPLE = {"none": 1, "current": 16, "blockwise": 128}
"""Rows and channels that the products of a recipe are made for (cuBLAS; blocks of 128)."""


def pack_multiple(config: RunConfig) -> int:
    """Tokens of every pack are a multiple of this, so that the rows of each rank's linears are one of `FP8_MULTIPLE`.

    Short packs are mostly padding then: current scaling at cp 8 makes them multiples of 128, blocks of 1,024.
    """
    parallel = config.parallel
    ranks = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)
    rows = FP8_MULTIPLE[config.model.fp8]
    return rows * ranks if rows > 1 else 1


def check_fp8(config: RunConfig, arch: InternVLArchitecture) -> None:
    """Refuse `model.fp8` where its kernels cannot run; what the GPU itself can do is checked on it.

    Raises:
        ConfigError: names the field that it does not go with.
    """
    model, parallel, language = config.model, config.parallel, arch.language
    if model.fp8 == "none":
        return
    rules: tuple[tuple[bool, str], ...] = (
        (
            config.runtime.dtype != "bfloat16",
            f"runtime.dtype is {config.runtime.dtype!r}, and what stays beside FP8 is bfloat16; set it to bfloat16",
        ),
        (
            parallel.attention_backend == "native",
            "parallel.attention_backend is 'native', and FP8 products are Transformer Engine's; set it to auto",
        ),
        (
            parallel.cp_sharding != "zigzag",
            f"parallel.cp_sharding is {parallel.cp_sharding!r}, which is native attention's; set it to zigzag",
        ),
        (
            language.experts is not None,
            f"{language.architecture} has experts, whose tokens come in any number; set model.fp8 to none",
        ),
        (
            2 * model.fp8_skip_layers >= language.num_layers
            or model.fp8_skip_layers > language.num_layers // parallel.pp,
            f"model.fp8_skip_layers is {model.fp8_skip_layers} at each end of {language.num_layers} layers on "
            f"{parallel.pp} stages, which leaves none in FP8 or fills more than a stage; make it smaller",
        ),
    )
    for is_broken, why in rules:
        if is_broken:
            raise ConfigError(f"model.fp8 is {model.fp8!r}, but {why}")
    _check_channels(config, arch)


def _check_channels(config: RunConfig, arch: InternVLArchitecture) -> None:
    language, tp = arch.language, config.parallel.tp
    multiple = FP8_MULTIPLE[config.model.fp8]
    query = language.num_heads * language.head_dim // tp
    sizes = {
        "hidden channels": language.hidden_size,
        "query channels": query,
        "query, key and value channels": query + 2 * language.kv_heads_of_rank(tp) * language.head_dim,
        "feed-forward channels": language.ffn_size // tp,
    }
    for what, size in sizes.items():
        if size % multiple:
            smaller = "current or none, or make parallel.tp smaller" if multiple == 128 else "none"
            raise ConfigError(
                f"model.fp8 is {config.model.fp8!r}, which needs multiples of {multiple}, but a rank of parallel.tp "
                f"{tp} has {size} {what}; set model.fp8 to {smaller}"
            )
