"""Parameter groups of a resumed optimizer: as the run is configured now, with the stored number of updates.

mcore loads a group with everything that was in it when it was saved: learning rates, betas, eps. A resumed run with
another optim.lr would silently train with the old one, and one with other groups (optim.lr_vision, optim.decay) would
not find them. Moments belong to parameters, not to groups, so the run's own groups lose nothing.
"""

from __future__ import annotations

from typing import Any

from megatron_v2pe.core.errors import CheckpointError


def with_own_groups(loaded: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A loaded optimizer state whose parameter groups are replaced by those of the optimizer.

    Args:
        loaded: argument of `load_state_dict` of mcore's distributed optimizer.
        optimizer: freshly built; its groups are those of the configuration.

    Raises:
        CheckpointError: the stored groups do not agree on the number of updates.
    """
    steps = {group["step"] for group in loaded["optimizer"]["param_groups"] if "step" in group}
    if len(steps) != 1:
        raise CheckpointError(
            f"the groups of the stored optimizer have {sorted(steps)} as their number of updates; expected one number"
        )
    (step,) = steps
    groups = [{**group, "step": step} for group in optimizer.state_dict()["optimizer"]["param_groups"]]
    return {**loaded, "optimizer": {**loaded["optimizer"], "param_groups": groups}}
