"""Put feature rows where the visual tokens are."""

from __future__ import annotations

from torch import Tensor


def splice(embedding_rbh: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Replace rows of the local embedding by visual features.

    Args:
        embedding_rbh: [r, 1, H], embedding of the local tokens.
        rows: [v, H], features of the local visual tokens, in any order.
        slots: int64 [v], where each row belongs.

    Returns:
        [r, 1, H]. With v = 0 the result still depends on `rows`, so that a rank without visual tokens joins
        in the backward pass of the routing collective.
    """
    return embedding_rbh.index_copy(0, slots, rows.to(embedding_rbh.dtype).unsqueeze(1))
