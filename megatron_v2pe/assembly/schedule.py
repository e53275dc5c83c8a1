"""mcore's pipeline schedule, called one way by training, generation and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func

ForwardStep = Callable[[Any, Any], tuple[Any, Any]]


def run_schedule(
    model_chunks: list[Any], forward_step: ForwardStep, batches: Sequence[Any], *, forward_only: bool = False
) -> list[Any]:
    """Forward, and unless `forward_only` backward, over all micro batches. Collective over pipeline stages.

    Args:
        model_chunks: those of this rank, wrapped or bare.
        forward_step: (iterator of batches, model chunk) -> (output, loss function or None), called once for each
            micro batch and model chunk.
        batches: this data parallel rank's micro batches, the same on all stages.
        forward_only: leave out the backward pass; call it under `torch.no_grad()`.

    Returns:
        On the last stage, what the loss function reported for each micro batch, or the output itself where
        there was none; elsewhere nothing.
    """
    iterators = [iter(batches) for _ in model_chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model_chunks) > 1 else iterators[0],
        model=model_chunks if len(model_chunks) > 1 else model_chunks[0],
        num_microbatches=len(batches),
        seq_length=1,  # real lengths are sent between stages: variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
    )
