"""What the ranks that answer together agree on: the next token, whether all went well, what rank 0 was asked.

A replica is tp x pp x cp ranks. Of a whole vocabulary row nothing travels between ranks unless it is asked for: the
most probable token is the best of tp pairs (largest logit, its index), and the probability that it had follows from
tp log-sum-exps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.topology import Ranks


def best_of_vocabulary(logits: Tensor, *, first_index: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Most probable token of rows whose vocabulary is split over tp; of equal ones the first, as argmax has it.

    Args:
        logits: float32 [n, V / tp], this rank's part; padding rows of the vocabulary hold -inf.
        first_index: vocabulary index of its first column.
        group: tensor parallel ranks.

    Returns:
        token int64 [n]; its logit, float64 [n]; log-sum-exp of the whole row, float64 [n].
    """
    largest, column = logits.max(dim=-1)
    mine = torch.stack([largest.double(), (column + first_index).double(), logits.logsumexp(-1).double()])
    if group.size() > 1:
        everyone = mine.new_empty(group.size() * 3, mine.shape[1])
        dist.all_gather_into_tensor(everyone, mine.contiguous(), group=group)
        everyone = everyone.unflatten(0, (group.size(), 3))
        winner = (
            everyone[:, 0].max(dim=0).indices
        )  # the first of equals is the lower rank, and so the lower index
        places = torch.arange(mine.shape[1], device=mine.device)
        mine = torch.stack(
            [everyone[winner, 0, places], everyone[winner, 1, places], everyone[:, 2].logsumexp(0)]
        )
    return mine[1].long(), mine[0], mine[2]


def top_of_vocabulary(logits: Tensor, count: int, *, first_index: int, group: Any) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of rows whose vocabulary is split over tp, falling, and their tokens, [n, count].

    Args:
        logits: [n, V / tp], this rank's part.
        count: at most the whole vocabulary.
        first_index: vocabulary index of the first column.
        group: tensor parallel ranks.
    """
    width = min(count, logits.shape[1])
    values, columns = logits.topk(width, dim=-1)
    if group.size() > 1:
        mine = torch.stack([values.double(), (columns + first_index).double()])
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine, group=group)
        everyone = torch.cat(parts, dim=-1)  # [2, n, tp * width], lower indices first
        order = everyone[0].argsort(dim=-1, descending=True, stable=True)[:, :count]
        return everyone[0].gather(1, order), everyone[1].gather(1, order).long()
    return values.double(), columns + first_index


def whole_vocabulary(logits: Tensor, *, vocab_size: int, group: Any) -> Tensor:
    """Rows [n, V / tp] of tp ranks side by side, [n, vocab_size] on each of them."""
    if group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits.contiguous(), group=group)
        logits = torch.cat(parts, dim=-1)
    return logits[:, :vocab_size]


def from_last_stage(values: Tensor | None, *, shape: tuple[int, ...], ranks: Ranks) -> Tensor:
    """float64 numbers that one context parallel rank of the last stage has, on all ranks of the replica.

    Args:
        values: [*shape] on the owner (and its tp ranks); None elsewhere. Several ranks may hold the same numbers.
        shape: known to all.
        ranks: this rank's place.
    """
    lowest = float("-inf")
    found = torch.full(shape, lowest, dtype=torch.float64, device=ranks.device)
    if values is not None:
        found = values.to(torch.float64).contiguous()
    for group in (ranks.groups.cp, ranks.groups.pp):
        if group.size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found


def highest(values: Tensor, *, group: Any) -> Tensor:
    """Largest of the ranks' values, element by element."""
    if group.size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def least(value: float, *, ranks: Ranks) -> float:
    """Smallest of the replica's values, on all of them."""
    found = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    for group in (ranks.groups.tp, ranks.groups.cp, ranks.groups.pp):
        if group.size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
    return float(found)


def agree_on_problem(problem: str, *, ranks: Ranks) -> str:
    """The same problem on all ranks of the replica, one of those that ranks met; "" when none did."""
    has_problem = least(-1.0 if problem else 0.0, ranks=ranks) < 0
    if not has_problem:
        return ""
    for group in (ranks.groups.tp, ranks.groups.cp, ranks.groups.pp):
        problem = _first_text(problem, group, ranks.device)
    return problem


def _first_text(text: str, group: Any, device: torch.device) -> str:
    """The text of the lowest rank of the group that has one."""
    if group.size() == 1:
        return text
    content = text.encode()
    length = torch.tensor([len(content)], device=device)
    lengths = [torch.empty_like(length) for _ in range(group.size())]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(size) for size in lengths]
    if not any(sizes):
        return ""
    source = next(index for index, size in enumerate(sizes) if size)
    content = _broadcast(content if group.rank() == source else bytes(sizes[source]), source, group, device)
    return content.decode()


def from_leader(content: bytes, *, ranks: Ranks) -> bytes:
    """Bytes that the replica's first rank was given, on all its ranks. Others may pass anything."""
    for group in (ranks.groups.tp, ranks.groups.cp, ranks.groups.pp):
        if group.size() == 1:
            continue
        length = torch.tensor([len(content)], device=ranks.device)
        dist.broadcast(length, dist.get_global_rank(group, 0), group=group)
        is_source = group.rank() == 0
        content = _broadcast(content if is_source else bytes(int(length)), 0, group, ranks.device)
    return content


def _broadcast(content: bytes, source: int, group: Any, device: torch.device) -> bytes:
    if not content:
        return content
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    dist.broadcast(buffer, dist.get_global_rank(group, source), group=group)
    return buffer.cpu().numpy().tobytes()
