"""Parameter groups of a resumed optimizer: as the run is configured now, with the stored number of updates.

mcore loads a group with everything that was in it when it was saved: learning rates, betas, eps. A resumed run with
another optim.lr would silently train with the old one, and one with other groups (optim.lr_vision, optim.decay) would
not find them. Moments belong to parameters, not to groups, so the run's own groups lose nothing.

Experts that are spread over ranks have an optimizer of their own, so a run at another `parallel.ep` may be of one
optimizer where the stored one was of two; plain values are then stored one level deeper, or less deep, than they load.
"""

from __future__ import annotations

from typing import Any

from megatron_v2pe.checkpoint.state import private_api
from megatron_v2pe.core.errors import CheckpointError


def with_own_groups(loaded: dict[Any, Any], optimizer: Any) -> dict[Any, Any]:
    """A loaded optimizer state whose parameter groups are replaced by those of the optimizer.

    Args:
        loaded: moments as `optimizer` asked for them, plain values as they were stored; of one optimizer, or by the
            number of each of several.
        optimizer: mcore's, freshly built; its groups are those of the configuration.

    Returns:
        Argument of the optimizer's `load_state_dict`.

    Raises:
        CheckpointError: the stored groups do not agree on the number of updates.
    """
    stored = [part for part in (loaded, *loaded.values()) if isinstance(part, dict) and "optimizer" in part]
    steps = {
        group["step"] for part in stored for group in part["optimizer"]["param_groups"] if "step" in group
    }
    if len(steps) != 1:
        raise CheckpointError(
            f"the groups of the stored optimizer have {sorted(steps)} as their number of updates; expected one number"
        )
    (step,) = steps
    plain = {name: value for name, value in stored[0].items() if isinstance(name, str)}

    def own(single: Any, part: dict[Any, Any]) -> dict[str, Any]:
        groups = [{**group, "step": step} for group in single.state_dict()["optimizer"]["param_groups"]]
        return {
            **plain,
            "optimizer": {**plain["optimizer"], "param_groups": groups},
            "param_state": part["param_state"],
        }

    singles = private_api.single_optimizers(optimizer)
    if len(singles) == 1:
        return own(singles[0], loaded)
    return {i: own(single, loaded[i]) for i, single in enumerate(singles)}
