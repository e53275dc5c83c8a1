"""mcore's pipeline schedule, called one way by training, generation and checks.

Packs differ in length, so mcore sends the shape of every tensor before the tensor: more messages, and the host waits
for the GPU at each. In training every stage has every pack of the step, so `KnownShapes` looks the shapes up instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

ForwardStep = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageRows:
    """What travels between pipeline stages in a step, known on all of them.

    Attributes:
        rows: r of each micro batch: hidden states are [r, 1, H].
        groups: mcore's process groups of this rank.
    """

    rows: Sequence[int]
    groups: ProcessGroupCollection


class KnownShapes(P2PCommunicator):
    """mcore's communicator, which receives no shapes from its peers: it counts what it has received.

    A rank receives micro batches in the order of mcore's schedule table, in which every stage runs them, forward and
    backward alike. Between the last rank and the first only inner virtual stages send, so these two leave one out.

    Args:
        stages: rows of the micro batches, and groups.
        config: mcore's configuration of the decoder.
        num_model_chunks: virtual stages of a rank.
    """

    def __init__(self, stages: StageRows, config: Any, *, num_model_chunks: int) -> None:
        super().__init__(pp_group=stages.groups.pp, config=config)
        group_size = config.microbatch_group_size_per_vp_stage or stages.groups.pp.size()
        table = get_schedule_table(len(stages.rows), num_model_chunks, group_size)
        every = [stages.rows[micro_batch] for micro_batch, _ in table]
        inner = [stages.rows[number] for number, chunk in table if chunk < num_model_chunks - 1]
        is_first, is_last = self.pp_group.rank() == 0, self.pp_group.rank() == self.pp_group.size() - 1
        self._hidden = config.hidden_size
        self._from_previous = deque(inner if is_first else every)
        self._from_next = deque(inner if is_last else every)

    def _communicate_shapes(
        self,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """What mcore calls before every exchange; nothing is sent."""
        nothing = [0, 0, 0]
        return (
            [self._from_previous.popleft(), 1, self._hidden] if recv_prev else nothing,
            [self._from_next.popleft(), 1, self._hidden] if recv_next else nothing,
        )

    def check_done(self) -> None:
        """Every micro batch was received once; anything else means that mcore's schedule is another one."""
        if self._from_previous or self._from_next:
            raise RuntimeError(
                f"{len(self._from_previous)} hidden states and {len(self._from_next)} gradients of the step were not "
                "received: megatron-core's schedule differs from the one that KnownShapes is written for"
            )


def run_schedule(
    model_chunks: list[Any],
    forward_step: ForwardStep,
    batches: Sequence[Any],
    *,
    forward_only: bool = False,
    stages: StageRows | None = None,
) -> list[Any]:
    """Forward, and unless `forward_only` backward, over all micro batches. Collective over pipeline stages.

    Args:
        model_chunks: those of this rank, wrapped or bare.
        forward_step: (iterator of batches, model chunk) -> (output, loss function or None), called once for each
            micro batch and model chunk.
        batches: this data parallel rank's micro batches, the same on all stages.
        forward_only: leave out the backward pass; call it under `torch.no_grad()`.
        stages: rows of all micro batches, where every stage knows them; None sends shapes between stages.

    Returns:
        On the last stage, what the loss function reported for each micro batch, or the output itself where
        there was none; elsewhere nothing.
    """
    iterators = [iter(batches) for _ in model_chunks]
    known: dict[str, Any] = {}
    communicator = None
    if stages is not None and stages.groups.pp.size() > 1 and not forward_only:
        config = get_model_config(model_chunks[0])
        communicator = KnownShapes(stages, config, num_model_chunks=len(model_chunks))
        known = dict(p2p_communicator=communicator, pg_collection=stages.groups)
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model_chunks) > 1 else iterators[0],
        model=model_chunks if len(model_chunks) > 1 else model_chunks[0],
        num_microbatches=len(batches),
        seq_length=1,  # real lengths are known, or sent between stages: variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
        **known,
    )
    if communicator is not None:
        communicator.check_done()
    return outputs
