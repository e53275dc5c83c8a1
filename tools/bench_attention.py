"""Context parallel attention against one process of as many threads: speed, and bytes sent by each rank.

    python tools/bench_attention.py                          16K tokens, cp 2, all three back ends, about two minutes
    python tools/bench_attention.py --documents 12288 2048 2048 --comm p2p
    python tools/bench_attention.py --cp 4 --rounds 1        more ranks than cores: the bytes still mean something

Both sides do the same work, forward and backward of causal attention with grouped heads: one process with cp threads
on the whole pack, and cp processes with one thread each on their zigzag shards. They run in turn, so that a
disturbance of the machine affects both; run it on an idle machine all the same.

How to read it. `speed` is the time of the one process over the time of the ranks, by medians; 1.00 means that
splitting the sequence costs nothing, and 0.90 is the target for p2p at 16K. `cpu` is the same of processor seconds,
summed over threads and ranks: it stays meaningful when others use the machine, but does not see waiting. `sent` are
the bytes that a rank wrote to its sockets, forward + backward, as counted by Linux; `formula` is the one of the back
end's docstring. They must agree within 1 %. B is the bytes of a rank's own keys and values.
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

from megatron_v2pe.parallel.attention.context_parallel import CONTEXT_PARALLEL_ATTENTION
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
        index = torch.from_numpy(shard_indices(cu_seqlens, cp=cp, cp_rank=rank))
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


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one forward and backward pass cost: seconds, processor seconds (all threads), bytes sent."""

    wall: float
    cpu: float
    sent: int


def counted(action: Callable[[], None]) -> Pass:
    """Cost of an action of all ranks to this one; `wall` is until the last rank is done."""
    dist.barrier()
    before, start, cpu = written_bytes(), time.perf_counter(), time.process_time()
    action()
    sent, cpu = written_bytes() - before, time.process_time() - cpu
    dist.barrier()
    return Pass(wall=time.perf_counter() - start, cpu=cpu, sent=sent)


def formula(problem: Problem, *, comm: str, rank: int, cp: int) -> float:
    """Bytes that a rank sends in one forward and backward pass."""
    element = problem.head_dim * problem.dtype.itemsize
    tokens = sum(problem.documents) / cp
    if comm == "a2a":
        one_way = (cp - 1) / cp * tokens * 2 * (problem.heads + problem.kv_heads) * element
        return 2 * one_way
    own = 2 * tokens * problem.kv_heads * element  # B
    keys = (cp - 1) * own
    if comm == "p2p":  # rank 0 passes on the early zigzag chunks alone
        keys = (cp - 1) * own / 2 if rank == 0 else (cp - rank) * own + (rank - 1) * own / 2
    gradients = (cp - 1 - rank) * own + rank * own / 2
    return 2 * keys + gradients


def forward_and_backward(problem: Problem, tensors: list[Tensor], *, comm: str, cp: int, group: Any) -> None:
    """One pass over a shard."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    lengths = [length // cp for length in problem.documents]
    scale = problem.head_dim**-0.5
    out = CONTEXT_PARALLEL_ATTENTION[comm](*leaves, lengths=lengths, scale=scale, group=group)
    out.backward(tensors[3])


def rank_main(rank: int, cp: int, folder: str, problem: Problem, orders: Any) -> None:
    """A rank: waits for the name of a back end, runs it once, sends its cost."""
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


def run_ranks(pipes: list[Any], comm: str) -> list[Pass]:
    """One pass of all ranks."""
    for pipe in pipes:
        pipe.send(comm)
    return [pipe.recv() for pipe in pipes]


def run_alone(problem: Problem, tensors: list[Tensor]) -> Pass:
    """One pass of this process over the whole pack."""
    start, cpu = time.perf_counter(), time.process_time()
    forward_and_backward(problem, tensors, comm="p2p", cp=1, group=None)
    return Pass(wall=time.perf_counter() - start, cpu=time.process_time() - cpu, sent=0)


def compare(problem: Problem, *, cp: int, comms: list[str], rounds: int) -> bool:
    """Print the table; whether every target was met."""
    torch.set_num_threads(cp)
    tensors = problem.tensors(0, 1)
    alone: list[Pass] = []
    ranks: dict[str, list[list[Pass]]] = {comm: [] for comm in comms}
    with started_ranks(problem, cp) as pipes:
        for _ in range(rounds + 1):
            alone.append(run_alone(problem, tensors))
            for comm in comms:
                ranks[comm].append(run_ranks(pipes, comm))
    walls = [cost.wall for cost in alone[1:]]  # the first warms up
    print(f"one process, {cp} threads: {statistics.median(walls):.2f} s (best {min(walls):.2f})")
    return all([report(problem, comm, cp, alone[1:], ranks[comm][1:]) for comm in comms])


def report(problem: Problem, comm: str, cp: int, alone: list[Pass], ranks: list[list[Pass]]) -> bool:
    """Print one back end's lines; whether its targets were met."""
    walls = [max(cost.wall for cost in turn) for turn in ranks]
    speed = statistics.median(cost.wall for cost in alone) / statistics.median(walls)
    best = min(cost.wall for cost in alone) / min(walls)
    cpu = statistics.median(cost.cpu for cost in alone) / statistics.median(
        sum(cost.cpu for cost in turn) for turn in ranks
    )
    print(
        f"{comm}, {cp} processes: {statistics.median(walls):.2f} s (best {min(walls):.2f}), "
        f"speed {speed:.2f}x (of best times {best:.2f}x), cpu {cpu:.2f}x"
    )
    own = 2 * sum(problem.documents) / cp * problem.kv_heads * problem.head_dim * problem.dtype.itemsize
    agree = True
    for rank, cost in enumerate(ranks[-1]):
        wanted = formula(problem, comm=comm, rank=rank, cp=cp)
        off = abs(cost.sent / wanted - 1)
        agree = agree and off <= TARGET_BYTES
        print(
            f"    rank {rank} sent {cost.sent / 2**20:.2f} MiB = {cost.sent / own:.3f} B, "
            f"formula {wanted / 2**20:.2f} MiB, off by {off:.2%}"
        )
    return agree and (comm != "p2p" or speed >= TARGET_SPEED)


def main() -> int:
    """Parse the command line, compare, print whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[16384], help="tokens of each document")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key heads")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a head")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cp", type=int, default=2, help="ranks, and threads of the one process")
    parser.add_argument(
        "--comm",
        nargs="+",
        choices=list(CONTEXT_PARALLEL_ATTENTION),
        default=list(CONTEXT_PARALLEL_ATTENTION),
    )
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
