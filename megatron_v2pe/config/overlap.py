"""Rules of communication that overlaps with computation: where megatron-core's switches cannot work, and why."""

from __future__ import annotations

from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError


def check_overlap(config: RunConfig, arch: InternVLArchitecture, world_size: int) -> None:
    """Refuse `parallel.overlap_grad_reduce` where gradients do not become ready as often in every step.

    mcore counts in the first step how often each parameter's gradient is added to, and reduces a bucket when all of
    its parameters have been reached as often again.

    Raises:
        ConfigError: names the field that it does not go with.
    """
    parallel = config.parallel
    if not parallel.overlap_grad_reduce:
        return
    rules: tuple[tuple[bool, str], ...] = (
        (
            world_size == parallel.tp * parallel.pp,
            f"the {world_size} ranks leave one for data and context parallelism and nothing is reduced",
        ),
        (
            parallel.vpp > 1,
            f"parallel.vpp is {parallel.vpp}, and model chunks of one rank would reduce in the middle of the schedule",
        ),
        (
            arch.language.experts is not None,
            f"{arch.language.architecture} has experts, which get no gradient in a step in which no token chose them",
        ),
        (
            config.vision.micro_batch_tiles > 0,
            f"vision.micro_batch_tiles is {config.vision.micro_batch_tiles}, and each slice adds to the tower's "
            "gradients",
        ),
        (
            config.model.mlp_chunks > 1,
            f"model.mlp_chunks is {config.model.mlp_chunks}, and each MLP chunk adds to the MLP's gradients",
        ),
    )
    for is_broken, why in rules:
        if is_broken:
            raise ConfigError(
                f"parallel.overlap_grad_reduce is true, but {why}; set overlap_grad_reduce (and "
                "overlap_param_gather) to false, or change the other"
            )
