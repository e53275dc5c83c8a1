"""Memory of the final norm and the chunked cross entropy, whose gradients are formed in forward.

    rows with a label [s, H] --head--> logits of c rows [c, V] --> d rows [s, H], d weight [V, H] float32

Shape legend: r local rows, l rows after gathering over tp, s supervised rows, c rows whose logits exist, H hidden, V
vocabulary rows of this rank; e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_v2pe.planning.memory.layers.operations import FLOAT_BYTES, LayerCosts


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Final norm and cross entropy on one rank.

    Attributes:
        rows: r.
        tokens: l.
        supervised: s, at most: labels of a long document may all fall to one rank.
        loss_chunk: c, at most.
        hidden: H.
        vocab_rows: V.
        is_trained: the head's weight gets a gradient.
        gathers: sequence parallelism is on, rows are gathered first.
    """

    rows: int
    tokens: int
    supervised: int
    loss_chunk: int
    hidden: int
    vocab_rows: int
    is_trained: bool
    gathers: bool


@dataclass(frozen=True, kw_only=True)
class HeadPeaks:
    """Bytes of the head: most in forward, between forward and backward, most in backward."""

    forward_bytes: float
    kept_bytes: float
    backward_bytes: float


def norm_kept_bytes(head: HeadShape, costs: LayerCosts) -> float:
    """The final norm: its input (fused), or float32 copy and normalised rows (torch's RMSNorm)."""
    rows, e = head.rows * head.hidden, costs.element_bytes
    return rows * e if costs.fused_norm else rows * (FLOAT_BYTES + e)


def logits_bytes(head: HeadShape, costs: LayerCosts) -> float:
    """Logits of a loss chunk, c V: float32, and beside it its form in the compute dtype, where that is another."""
    loss_chunk, e = min(head.loss_chunk, head.supervised), costs.element_bytes
    return loss_chunk * head.vocab_rows * (FLOAT_BYTES + (e if e < FLOAT_BYTES else 0))


def head_peaks(head: HeadShape, costs: LayerCosts) -> HeadPeaks:
    """Peaks of the last stage's head.

    Kept: what the norm keeps, d rows s H e, d weight 4 V H.
    Forward: that, the norm's output r H e, rows s H e (and all gathered rows l H e before they are picked), the
    logits of a loss chunk and their product V H e.
    Backward: d rows is scaled (s H e again); d weight is rounded (V H e in half precision).
    """
    e = costs.element_bytes
    weight = head.hidden * head.vocab_rows * head.is_trained
    supervised, norm = head.supervised * head.hidden * e, norm_kept_bytes(head, costs)
    gathered = head.tokens * head.hidden * e * head.gathers
    output = head.rows * head.hidden * e
    is_half = e < FLOAT_BYTES
    product = weight * e if head.supervised else 0
    loss_chunk = logits_bytes(head, costs) + product
    scaled = 2 * supervised + weight * (FLOAT_BYTES + (e if is_half else 0))
    spread = supervised + head.tokens * head.hidden * e
    return HeadPeaks(
        forward_bytes=norm
        + output
        + max(gathered + supervised, 2 * supervised + weight * FLOAT_BYTES + loss_chunk),
        kept_bytes=norm + supervised + weight * FLOAT_BYTES,
        backward_bytes=norm + max(scaled, spread),
    )
