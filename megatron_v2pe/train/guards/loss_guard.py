"""How large a loss may be before its step is left out: so many times the median of the last applied ones.

    losses of applied steps --median of the last runtime.loss_window--> x runtime.max_loss_ratio = limit of the next

The loss is a sum over the world, so all ranks come to the same limit and the same decision. The window travels in the
checkpoint: a run that is started again decides as if it had not been interrupted. A median, because one spike that was
just small enough must not make room for a larger one.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from megatron_v2pe.train.step import StepReport


class LossGuard:
    """Knows the losses of the last applied steps.

    Args:
        max_ratio: see `runtime.max_loss_ratio`; 0 allows every loss and remembers none.
        window: see `runtime.loss_window`.
        losses: of the last applied steps, oldest first, from the checkpoint.
    """

    def __init__(self, *, max_ratio: float, window: int, losses: Sequence[float] = ()) -> None:
        self._max_ratio = max_ratio
        self._losses = deque(losses if max_ratio else (), maxlen=window)

    @property
    def limit(self) -> float:
        """Largest loss that the next step may have; infinite while too few are known."""
        if not self._max_ratio or len(self._losses) < (self._losses.maxlen or 0):
            return math.inf
        return self._max_ratio * statistics.median(self._losses)

    def after(self, report: StepReport) -> tuple[float, ...]:
        """Remember the loss of a step that was applied; what a checkpoint keeps."""
        if self._max_ratio and report.is_applied:
            self._losses.append(report.loss)
        return tuple(self._losses)
