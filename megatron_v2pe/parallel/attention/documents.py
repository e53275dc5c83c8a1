"""Document lengths and boundaries of packed parameters, in the form that each back end needs."""

from __future__ import annotations

import dataclasses

from megatron.core.packed_seq_params import PackedSeqParams

_PLAIN_FIELDS = tuple(field.name for field in dataclasses.fields(PackedSeqParams))


def local_lengths(params: PackedSeqParams, cp: int) -> tuple[int, ...]:
    """Tokens of each document on this rank, on the host.

    Where the parameters do not say (`V2PEPackedSeqParams.document_lengths`), read from the device once per micro batch:
    every layer is given the same object, which keeps the result.
    """
    given = getattr(params, "document_lengths", None)
    if given is not None:
        return tuple(length // cp for length in given)
    known: tuple[int, tuple[int, ...]] | None = params.__dict__.get("_local_lengths")
    if known is None or known[0] != cp:
        boundaries = params.cu_seqlens_q_padded
        if boundaries is None:
            boundaries = params.cu_seqlens_q
        lengths = tuple((boundaries.diff() // cp).tolist())
        known = (cp, lengths)
        params.__dict__["_local_lengths"] = known
    return known[1]


def padding_counts_as_tokens(params: PackedSeqParams) -> PackedSeqParams:
    """mcore's plain parameters, in which the real boundaries are the padded ones."""
    padded = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
    fields = {name: getattr(params, name) for name in _PLAIN_FIELDS}
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return PackedSeqParams(**{**fields, **dict.fromkeys(names, padded)})
