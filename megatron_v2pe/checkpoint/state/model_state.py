"""The sharded state of a model: which keys it has, and loading it into model chunks.

    state key = name of the parameter in the whole, un-sharded model          (SHARDED_STATE_METADATA)

All code that saves or loads a model uses `model_sharded_state_dict`, so all of it agrees on the keys. Keys are per
layer (mcore can also stack layers), so that a reader of one layer does not touch the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_v2pe.checkpoint.files.adapter_record import require_whole
from megatron_v2pe.checkpoint.files.folder import expert_bias_of, state_path
from megatron_v2pe.checkpoint.state.load import load_state
from megatron_v2pe.config.lora import is_adapter_parameter
from megatron_v2pe.core.errors import CheckpointError
from megatron_v2pe.parallel.topology import Ranks

SHARDED_STATE_METADATA: dict[str, Any] = {
    "non_homogeneous_layers": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}
"""How mcore names and splits state: one key per layer; optimizer state in the shape of its parameter."""

Wanted = Callable[[str], bool]
"""Whether a parameter of this name is saved or loaded."""


def sharded_state_metadata(ranks: Ranks) -> dict[str, Any]:
    """`SHARDED_STATE_METADATA` with the group over which the decoder's weights are copies."""
    return {**SHARDED_STATE_METADATA, "dp_cp_group": ranks.groups.dp_cp}


def every_parameter(name: str) -> bool:
    """All parameters."""
    return True


def without_adapters(name: str) -> bool:
    """Parameters of the model itself, not of adapters that were added to it."""
    return not is_adapter_parameter(name)


def model_sharded_state_dict(
    model_chunks: Sequence[torch.nn.Module], ranks: Ranks, *, wanted: Wanted = every_parameter
) -> dict[str, Any]:
    """Parameters that this rank's model chunks save or load, keyed `model0`, `model1`, ...; those that are `wanted`.

    Transformer Engine's `_extra_state` is left out: it is empty without fp8, and an imported checkpoint has none.
    """
    metadata = sharded_state_metadata(ranks)
    states = {}
    for i, model_chunk in enumerate(model_chunks):
        shards = _unwrapped(model_chunk).sharded_state_dict(metadata=metadata)
        states[f"model{i}"] = {
            k: v for k, v in shards.items() if wanted(k) and not k.endswith("_extra_state")
        }
    return states


def load_into_model_chunks(
    model_chunks: Sequence[torch.nn.Module],
    states: Mapping[str, Any],
    *,
    wanted: Wanted = every_parameter,
) -> None:
    """Copy loaded `model_sharded_state_dict` tensors into model chunks; parameters that are not `wanted` stay.

    Raises:
        CheckpointError: a parameter got nothing, or a tensor has no parameter.
    """
    for i, model_chunk in enumerate(model_chunks):
        result = _unwrapped(model_chunk).load_state_dict(states[f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if wanted(key) and not key.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"model and checkpoint differ: missing {missing}, unexpected {result.unexpected_keys}"
            )


def _unwrapped(model_chunk: Any) -> Any:
    """The model chunk inside mcore's wrappers: DDP prefixes keys with `module.` and hides what a load left out."""
    while hasattr(model_chunk, "module"):
        model_chunk = model_chunk.module
    return model_chunk


def load_model_weights(
    checkpoint_folder: str | Path, model_chunks: Sequence[torch.nn.Module], *, ranks: Ranks
) -> None:
    """Load weights, and the bias of the routers' choice, into a model of any parallel layout. Collective.

    Adapters of the model stay as they are.

    Call it before the optimizer is built, whose float32 copies are made from the weights at that time.

    Raises:
        CheckpointError: the folder is not a complete checkpoint, has adapters only, or is of another model.
    """
    require_whole(checkpoint_folder)
    states = model_sharded_state_dict(model_chunks, ranks, wanted=without_adapters)
    loaded = load_state(state_path(checkpoint_folder), states)
    load_into_model_chunks(model_chunks, loaded, wanted=without_adapters)
    load_expert_bias(checkpoint_folder, model_chunks)


def load_expert_bias(checkpoint_folder: str | Path, model_chunks: Sequence[Any]) -> None:
    """Give the routers the bias that a checkpoint stores; where it stores none they keep theirs.

    Raises:
        CheckpointError: not a complete checkpoint.
    """
    table = expert_bias_of(checkpoint_folder)
    if table:
        from megatron_v2pe.assembly.optim.expert_bias import (
            put_expert_bias,  # megatron-core: exports need none of it
        )

        put_expert_bias(table, model_chunks)
