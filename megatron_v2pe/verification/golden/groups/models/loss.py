"""Weighted losses of two data parallel ranks and their gradients, through the model's own cross entropy.

The golden cases give logits; a head whose weight is the identity turns them into "hidden states", so that the
chunked cross entropy of training computes the losses. Two normalisations of the release are compared:

    local       each rank divides by its own weight sum
    all-gather  each rank divides by the mean of both ranks' sums; averaged over ranks this is
                total weighted loss / total weight, which is what training here divides by, once
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX
from megatron_v2pe.config.schema import DataConfig
from megatron_v2pe.data.collate import shift_left
from megatron_v2pe.models.loss import HeadPorts, weighted_cross_entropy
from megatron_v2pe.verification.golden.rows import Row, compared, equal

LOSS_ATOL = 1e-5  # float32 losses of order 5
GRADIENT_ATOL = 1e-6  # gradients of order 0.1, float32
LOSS_CHUNK = 7  # smaller than the rows, so that there are several loss chunks


def run(folder: Path, *, family: str | None) -> Iterator[Row]:
    """All cases of packing/loss.json."""
    tensors = load_file(folder / "packing" / "loss.safetensors")
    for index, case in enumerate(
        json.loads((folder / "packing" / "loss.json").read_text(encoding="utf-8"))["cases"]
    ):
        for mode, wanted in case["modes"].items():
            name = f"loss/{case.get('index', index)}_{mode}"
            if "reference_error" in wanted:
                known = get_args(get_type_hints(DataConfig)["loss_reduction"])
                yield equal(
                    name, "refused_as_by_release", is_equal=mode not in known, detail=f"{mode} is accepted"
                )
                continue
            yield from _mode_rows(name, wanted, [_rank(tensors, index, rank, mode) for rank in (0, 1)])


def _rank(tensors: dict[str, Tensor], index: int, rank: int, mode: str) -> dict[str, Tensor]:
    """Logits, shifted labels and weights of one rank, and its wanted gradient."""
    prefix = next(
        name.rsplit("/", 1)[0]
        for name in tensors
        if name.split("/")[0].endswith(str(index)) and f"rank{rank}/" in name
    )
    labels = tensors[f"{prefix}/labels"].flatten().numpy()
    weights = tensors[f"{prefix}/weight_{mode}"].flatten().numpy()
    return {
        "logits": tensors[f"{prefix}/logits"].clone().requires_grad_(),
        "labels": torch.from_numpy(shift_left(labels, fill=IGNORE_INDEX)),
        "weights": torch.from_numpy(shift_left(weights.astype(np.float32), fill=0.0)),
        "gradient": tensors[f"{prefix}/grad_logits_allgather_{mode}"],
    }


def _mode_rows(name: str, wanted: dict[str, Any], ranks: list[dict[str, Tensor]]) -> Iterator[Row]:
    numerators = [_weighted_loss(rank) for rank in ranks]
    sums = [rank["weights"].sum() for rank in ranks]
    mean_sum = torch.stack(sums).mean()
    local = [numerator / total for numerator, total in zip(numerators, sums, strict=True)]
    gathered = [numerator / mean_sum for numerator in numerators]
    yield _numbers(name, "weight_sum_per_rank", sums, wanted["weight_sum_per_rank"])
    yield _numbers(name, "loss_local_norm", local, wanted["loss_local_norm"])
    yield _numbers(name, "loss_allgather", gathered, wanted["loss_allgather"])
    overall = torch.stack(numerators).sum() / torch.stack(sums).sum()
    yield _numbers(name, "mean_over_ranks", [overall], [wanted["mean_over_ranks"]])
    errors = []
    for rank, loss in zip(ranks, gathered, strict=True):
        (gradient,) = torch.autograd.grad(loss, rank["logits"])
        errors.append(float((gradient - rank["gradient"]).abs().max()))
    yield compared(name, "grad_logits_allgather", error=max(errors), tolerance=GRADIENT_ATOL)


def _weighted_loss(rank: dict[str, Tensor]) -> Tensor:
    supervised = (rank["labels"] != IGNORE_INDEX).nonzero().squeeze(1)
    vocab_size = rank["logits"].shape[-1]
    total, _ = weighted_cross_entropy(
        rank["logits"].reshape(-1, vocab_size)[supervised],
        torch.eye(vocab_size),
        rank["labels"][supervised],
        row_weights=rank["weights"][supervised],
        vocab_size=vocab_size,
        loss_chunk_tokens=LOSS_CHUNK,
        ports=HeadPorts(),
    )
    return total


def _numbers(name: str, quantity: str, ours: list[Tensor], wanted: list[float]) -> Row:
    values = [float(value.detach()) for value in ours]
    # A rank without a weight divides 0 by 0; the release's number is nan too.
    errors = [
        0.0 if math.isnan(a) and math.isnan(b) else abs(a - b) for a, b in zip(values, wanted, strict=True)
    ]
    error = math.nan if any(map(math.isnan, errors)) else max(errors)
    return compared(name, quantity, error=error, tolerance=LOSS_ATOL)
