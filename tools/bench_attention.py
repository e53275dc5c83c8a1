"""Context parallel attention against one process of as many threads: speed, and bytes sent by each rank.

    python tools/bench_attention.py                          16K tokens, cp 2, all three back ends, about two minutes
    python tools/bench_attention.py --documents 12288 2048 2048 --comm p2p
    python tools/bench_attention.py --cp 4 --rounds 1        more ranks than cores: the bytes still mean something

Both sides do the same work, forward and backward of causal attention with grouped heads: one process with cp threads
on the whole pack, and cp processes with one thread each on their zigzag shards. They take turns, so that a
disturbance of the machine hits both; run it on an idle machine all the same.

How to read it. `speed` is the time of the one process over the time of the ranks, by medians; 1.00 means that
splitting the sequence costs nothing, and 0.90 is the target for p2p at 16K. `sent` are the bytes that a rank wrote to
its sockets, forward + backward, as counted by Linux; `formula` is what the back end's docstring promises. They have to
agree within 1 %. B is the bytes of a rank's own keys and values.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_v2pe.parallel.attention.context import CONTEXT_ATTENTION
from megatron_v2pe.parallel.zigzag import shard_indices

TARGET_SPEED, TARGET_BYTES = 0.90, 0.01


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention: documents in tokens of the whole pack, heads, and how elements are stored."""

    documents: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def tensors(self, rank: int, cp: int) -> list[Tensor]:
        """Queries, keys, values and output gradient of a rank's shard."""
        cu_seqlens = np.concatenate([[0], np.cumsum(self.documents)]).astype(np.int64)
        index = torch.from_numpy(shard_indices(cu_seqlens, cp_size=cp, cp_rank=rank))
        generator = torch.Generator().manual_seed(0)
        counts = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        whole = (torch.randn(sum(self.documents), n, self.head_dim, generator=generator) for n in counts)
        return [x[index].to(self.dtype) for x in whole]


def written_bytes() -> int:
    """Bytes that this process has written so far; between two barriers of gloo's ranks these are its messages.

    Counted by the kernel, headers included, whatever calls the code makes.
    """
    with open("/proc/self/io", encoding="ascii") as file:
        counters = dict(line.split(": ") for line in file.read().splitlines())
    return int(counters["wchar"])


def counted(action: Callable[[], None]) -> tuple[float, int]:
    """Seconds until all ranks are done, and bytes sent by this one."""
    dist.barrier()
    before, start = written_bytes(), time.perf_counter()
    action()
    sent = written_bytes() - before
    dist.barrier()
    return time.perf_counter() - start, sent


def formula(problem: Problem, *, comm: str, rank: int, cp: int) -> float:
    """Bytes that a rank sends in one forward and backward pass."""
    element = problem.head_dim * problem.dtype.itemsize
    tokens = sum(problem.documents) / cp
    if comm == "a2a":
        one_way = (cp - 1) / cp * tokens * 2 * (problem.heads + problem.kv_heads) * element
        return 2 * one_way
    own = 2 * tokens * problem.kv_heads * element  # B
    keys = 2 * (cp - 1) * own
    gradients = (cp - 1 - rank) * own + rank * own / 2
    return keys + gradients


def forward_and_backward(problem: Problem, tensors: list[Tensor], *, comm: str, cp: int, group: Any) -> None:
    """One pass over a shard."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    lengths = [length // cp for length in problem.documents]
    scale = problem.head_dim**-0.5
    out = CONTEXT_ATTENTION[comm](*leaves, lengths=lengths, scale=scale, group=group)
    out.backward(tensors[3])


def rank_main(rank: int, cp: int, folder: str, problem: Problem, orders: Any) -> None:
    """A rank: waits for the name of a back end, runs it once, answers with seconds and bytes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=cp)
    tensors = problem.tensors(rank, cp)
    while True:
        comm = orders.recv()
        if comm is None:
            break
        work = partial(forward_and_backward, problem, tensors, comm=comm, cp=cp, group=dist.group.WORLD)
        orders.send(counted(work))
    dist.destroy_process_group()


@contextlib.contextmanager
def started_ranks(problem: Problem, cp: int) -> Iterator[list[Any]]:
    """Processes of `rank_main`, as the pipes to them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(cp):
            ours, theirs = context.Pipe()
            ranks.append(
                context.Process(target=rank_main, args=(rank, cp, folder, problem, theirs), daemon=True)
            )
            ranks[-1].start()
            pipes.append(ours)
        yield pipes
        for pipe in pipes:
            pipe.send(None)
        for process in ranks:
            process.join(30)


def run_ranks(pipes: list[Any], comm: str) -> tuple[float, list[int]]:
    """Slowest rank's seconds, and bytes sent by rank."""
    for pipe in pipes:
        pipe.send(comm)
    answers = [pipe.recv() for pipe in pipes]
    return max(seconds for seconds, _ in answers), [sent for _, sent in answers]


def run_alone(problem: Problem, tensors: list[Tensor]) -> float:
    """Seconds of one process on the whole pack."""
    start = time.perf_counter()
    forward_and_backward(problem, tensors, comm="p2p", cp=1, group=None)
    return time.perf_counter() - start


def compare(problem: Problem, *, cp: int, comms: list[str], rounds: int) -> bool:
    """Print the table; whether every target was met."""
    torch.set_num_threads(cp)
    tensors = problem.tensors(0, 1)
    alone: list[float] = []
    times: dict[str, list[float]] = {comm: [] for comm in comms}
    sent: dict[str, list[int]] = {}
    with started_ranks(problem, cp) as pipes:
        for turn in range(rounds + 1):  # the first warms up
            seconds = run_alone(problem, tensors)
            found = {comm: run_ranks(pipes, comm) for comm in comms}
            sent = {comm: count for comm, (_, count) in found.items()}
            if turn:
                alone.append(seconds)
                for comm in comms:
                    times[comm].append(found[comm][0])
    print(f"one process, {cp} threads: {statistics.median(alone):.2f} s (best {min(alone):.2f})")
    return all([report(problem, comm, cp, alone, times[comm], sent[comm]) for comm in comms])


def report(
    problem: Problem, comm: str, cp: int, alone: list[float], times: list[float], sent: list[int]
) -> bool:
    """Print one back end's lines; whether its targets were met."""
    speed = statistics.median(alone) / statistics.median(times)
    best = min(alone) / min(times)
    print(
        f"{comm}, {cp} processes: {statistics.median(times):.2f} s (best {min(times):.2f}), "
        f"speed {speed:.2f}x (of best times {best:.2f}x)"
    )
    own = 2 * sum(problem.documents) / cp * problem.kv_heads * problem.head_dim * problem.dtype.itemsize
    agree = True
    for rank, count in enumerate(sent):
        wanted = formula(problem, comm=comm, rank=rank, cp=cp)
        off = abs(count / wanted - 1)
        agree = agree and off <= TARGET_BYTES
        print(
            f"    rank {rank} sent {count / 2**20:.2f} MiB = {count / own:.3f} B, "
            f"formula {wanted / 2**20:.2f} MiB, off by {off:.2%}"
        )
    return agree and (comm != "p2p" or speed >= TARGET_SPEED)


def main() -> int:
    """Parse the command line, compare, say whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[16384], help="tokens of each document")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key heads")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cp", type=int, default=2, help="ranks, and threads of the one process")
    parser.add_argument("--comm", nargs="+", choices=list(CONTEXT_ATTENTION), default=list(CONTEXT_ATTENTION))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side after one to warm up")
    options = parser.parse_args()
    problem = Problem(
        documents=tuple(options.documents),
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=getattr(torch, options.dtype),
    )
    print(
        f"documents {options.documents}, {problem.heads} heads, {problem.kv_heads} KV heads of {problem.head_dim}, "
        f"{options.dtype}, forward + backward, {options.rounds} rounds"
    )
    met = compare(problem, cp=options.cp, comms=options.comm, rounds=options.rounds)
    print("targets met" if met else f"MISSED: bytes within {TARGET_BYTES:.0%}, p2p speed {TARGET_SPEED:.2f}x")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
