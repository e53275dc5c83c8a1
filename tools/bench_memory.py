"""Memory of a training step: over context parallel ranks, by option, of the loss, and bytes of the feature router.

    python tools/bench_memory.py activations      peak of a step per rank at cp 1, 2, 4
    python tools/bench_memory.py options          recompute, slices of tiles, MLP and loss chunks: peak and time
    python tools/bench_memory.py tiles            peak by number of tiles, all at once and in slices
    python tools/bench_memory.py loss             chunked against plain cross entropy: peak and time
    python tools/bench_memory.py router           bytes that the feature router sends, against what has to move
    python tools/bench_memory.py                  all of them, a few minutes on two cores

How to read it. `peak` is the most that a forward and backward pass allocated at a time, beyond weights and gradient
buffers, counted by torch's profiler at its allocator (temporaries inside operators included); it does not depend on
what else the machine does. Times are processor seconds of one thread, the least of several passes. Ratios are what
carries over to other sizes. Models are small, with random weights; --tokens, --hidden, --layers make them larger.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bench_support.step import best_seconds, machine, on_ranks

from megatron_v2pe.batch.packed_batch import tile_share
from megatron_v2pe.config.schema import ModelConfig, ParallelConfig, RunConfig, RuntimeConfig, VisionConfig
from megatron_v2pe.models.loss import HeadPorts, weighted_cross_entropy
from megatron_v2pe.parallel.feature_router import FeatureRouter, feature_route
from megatron_v2pe.parallel.topology import ParallelPlan
from megatron_v2pe.parallel.zigzag import shard_indices, shard_ranges_of_ranks
from megatron_v2pe.planning.measured_step import MeasuredStep, StepSizes, peak_bytes
from megatron_v2pe.v2pe.positions import visual_rows

MIB = 2**20
TARGET_ACTIVATIONS = {2: 0.58, 4: 0.33}
TARGET_LOSS_TIME = 1.15


def run_config(dtype: str, *, cp: int = 1, **sections: Any) -> RunConfig:
    """A run that differs from the defaults in these sections."""
    return RunConfig(parallel=ParallelConfig(cp=cp), runtime=RuntimeConfig(dtype=dtype), **sections)


def step_peak(sizes: StepSizes, config: RunConfig) -> int:
    """Peak of one step on this rank."""
    return peak_bytes(MeasuredStep(config=config, sizes=sizes))


def activations(sizes: StepSizes, options: argparse.Namespace) -> bool:
    """Peak of a step at cp 1, 2, 4, the largest over ranks."""
    print(f"one step, {sizes.tokens} tokens, {sizes.tiles} tiles, no recompute, {options.dtype}")
    met, whole = True, 0
    for cp in (1, 2, 4):
        peaks = on_ranks(step_peak, cp, sizes, run_config(options.dtype, cp=cp))
        whole = whole or max(peaks)
        ratio, target = max(peaks) / whole, TARGET_ACTIVATIONS.get(cp)
        met = met and (target is None or ratio <= target)
        wanted = "" if target is None else f", target {target}x"
        print(
            f"  cp {cp}: peak {max(peaks) / MIB:.0f} MiB per rank, {ratio:.3f}x of cp 1{wanted}", flush=True
        )
    return met


def core_attention(model: Any) -> None:
    """mcore's selective recompute of the attention core, which the configuration does not offer."""
    for layer in model.language.decoder.layers:
        layer.self_attention.checkpoint_core_attention = True


OPTIONS: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "nothing recomputed": ({}, None),
    "attention core (mcore; not offered)": ({}, core_attention),
    "model.recompute=selective": ({"model": ModelConfig(recompute="selective")}, None),
    "model.recompute=full": ({"model": ModelConfig(recompute="full")}, None),
    "model.recompute=full mlp_chunks=4": ({"model": ModelConfig(recompute="full", mlp_chunks=4)}, None),
    "vision.recompute=selective": ({"vision": VisionConfig(recompute="selective")}, None),
    "vision.recompute=full": ({"vision": VisionConfig(recompute="full")}, None),
    "vision.micro_batch_tiles=8": ({"vision": VisionConfig(micro_batch_tiles=8)}, None),
    "both recompute=full": (
        {"model": ModelConfig(recompute="full"), "vision": VisionConfig(recompute="full")},
        None,
    ),
    "full, mlp_chunks=4, micro_batch_tiles=8": (
        {
            "model": ModelConfig(recompute="full", mlp_chunks=4),
            "vision": VisionConfig(recompute="full", micro_batch_tiles=8),
        },
        None,
    ),
    "... and loss_chunk_tokens=256": (
        {
            "model": ModelConfig(recompute="full", mlp_chunks=4, loss_chunk_tokens=256),
            "vision": VisionConfig(recompute="full", micro_batch_tiles=8),
        },
        None,
    ),
}


def measure_option(sizes: StepSizes, config: RunConfig, change: Any, repeats: int) -> tuple[int, float]:
    """Peak and best time of a step."""
    step = MeasuredStep(config=config, sizes=sizes, change=change)
    return peak_bytes(step), best_seconds(step, repeats)


def option_table(sizes: StepSizes, options: argparse.Namespace) -> bool:
    """Each option alone, then together."""
    print(f"one step on one rank, {sizes.tokens} tokens, {sizes.tiles} tiles, {options.dtype}")
    print("| option | peak MiB | of the first | step s | of the first |\n|---|---|---|---|---|")
    first: tuple[int, float] | None = None
    for name, (sections, change) in OPTIONS.items():
        config = run_config(options.dtype, **sections)
        ((peak, seconds),) = on_ranks(measure_option, 1, sizes, config, change, options.repeats)
        first = first or (peak, seconds)
        times = f"{seconds:.2f} | {seconds / first[1]:.2f}x"
        print(f"| {name} | {peak / MIB:.0f} | {peak / first[0]:.2f}x | {times} |", flush=True)
    return True


def tile_table(sizes: StepSizes, options: argparse.Namespace) -> bool:
    """Peak of a step by number of tiles."""
    print(
        f"one step on one rank, tower of {sizes.vision_layers} layers, hidden {sizes.vision_hidden}, {options.dtype}"
    )
    for tiles in (100, 300, 1000):
        many = dataclasses.replace(sizes, tiles=tiles, tokens=tiles * 18 + 64, layers=1)
        peaks = {}
        for slices in (0, 8):
            vision = VisionConfig(micro_batch_tiles=slices)
            config = run_config(options.dtype, vision=vision, model=ModelConfig(recompute="full"))
            (peaks[slices],) = on_ranks(step_peak, 1, many, config)
        print(
            f"  {tiles} tiles: all at once {peaks[0] / MIB:.0f} MiB, in slices of 8 {peaks[8] / MIB:.0f} MiB "
            f"({peaks[8] / peaks[0]:.2f}x)",
            flush=True,
        )
    return True


def loss_table(sizes: StepSizes, options: argparse.Namespace) -> bool:
    """Chunked against plain cross entropy, forward and backward, by number of supervised tokens."""
    hidden, vocab, chunk = options.loss_hidden, options.loss_vocab, options.loss_chunk
    print(
        f"cross entropy, forward + backward, hidden {hidden}, vocabulary {vocab}, loss chunks of {chunk}, float32"
    )
    met, beyond = True, []
    for rows in (1024, 2048, 4096):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, hidden, generator=generator, requires_grad=True)
        head = (torch.randn(vocab, hidden, generator=generator) * 0.02).requires_grad_()
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        weights = torch.rand(rows, generator=generator)

        def clear(x: torch.Tensor = x, head: torch.Tensor = head) -> None:
            x.grad = head.grad = None

        def plain(x: Any = x, head: Any = head, labels: Any = labels, weights: Any = weights) -> None:
            (F.cross_entropy(x @ head.t(), labels, reduction="none") * weights).sum().backward()

        def chunked(x: Any = x, head: Any = head, labels: Any = labels, weights: Any = weights) -> None:
            total, _ = weighted_cross_entropy(
                x,
                head,
                labels,
                row_weights=weights,
                vocab_size=vocab,
                loss_chunk_tokens=chunk,
                ports=HeadPorts(),
            )
            total.backward()

        gradients = (x.numel() + head.numel()) * 4
        peaks, times = {}, {"plain": [], "chunked": []}
        for name, action in (("plain", plain), ("chunked", chunked)):
            peaks[name] = peak_bytes(action) - gradients
            clear()
        for turn in range(
            options.repeats + 1
        ):  # in turns, so that a disturbance affects both; the first warms up
            for name, action in (("plain", plain), ("chunked", chunked)):
                start = time.process_time()
                action()
                if turn:
                    times[name].append(time.process_time() - start)
                clear()
        beyond.append(peaks["chunked"])
        ratio = min(times["chunked"]) / min(times["plain"])
        met = met and ratio <= TARGET_LOSS_TIME
        print(
            f"  {rows} tokens: peak beyond the gradients: plain {peaks['plain'] / MIB:.0f} MiB, chunked "
            f"{peaks['chunked'] / MIB:.0f} MiB; time: plain {min(times['plain']):.2f} s, chunked "
            f"{min(times['chunked']):.2f} s, {ratio:.2f}x of target {TARGET_LOSS_TIME}x",
            flush=True,
        )
    growth = (beyond[-1] - beyond[0]) / (3072 * vocab * 4)
    print(f"  growth of the chunked peak: {growth:.4f} of tokens x vocabulary x 4 bytes (0 is independent)")
    return met and growth < 0.02


def written_bytes() -> int:
    """Bytes that this process has written so far, sockets included, as Linux counts them."""
    with open("/proc/self/io", encoding="ascii") as file:
        return int(dict(line.split(": ") for line in file.read().splitlines())["wchar"])


def routed(sizes: StepSizes, hidden: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Bytes to other ranks, forward and backward: given to all_to_all_single, and written to sockets."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    plan = ParallelPlan(cp=world_size)
    layout = sizes.layout(pad_to_multiple=plan.pad_to_multiple)
    shards = shard_ranges_of_ranks(layout.cu_seqlens, cp=plan.cp)
    route = feature_route(layout, shards, plan=plan, tile_rank=rank, device=torch.device("cpu"))
    first, stop = tile_share(layout.num_tiles, world_size, rank)
    features = torch.randn((stop - first) * layout.tokens_per_tile, hidden, dtype=dtype, requires_grad=True)
    router, calls = FeatureRouter(dist.group.WORLD), []
    real = dist.all_to_all_single

    def counting(received: Any, sent: Any, received_splits: Any, sent_splits: Any, group: Any = None) -> Any:
        others = sum(count for peer, count in enumerate(sent_splits) if peer != rank)
        calls.append(others * sent[:1].numel() * sent.element_size())
        return real(received, sent, received_splits, sent_splits, group=group)

    dist.all_to_all_single = counting
    dist.barrier()
    before = written_bytes()
    rows = router(features, route)
    between = written_bytes()
    dist.barrier()
    start = written_bytes()
    rows.backward(torch.ones_like(rows))
    after = written_bytes()
    dist.all_to_all_single = real
    assert len(calls) == 2, f"{len(calls)} exchanges, expected one forward and one backward"
    return calls[0], calls[1], between - before, after - start


def moving_rows(sizes: StepSizes, cp: int) -> np.ndarray:
    """[encoder, owner] feature rows, counted from the whole pack: who encodes a row's tile, who owns its token."""
    layout = sizes.layout(pad_to_multiple=ParallelPlan(cp=cp).pad_to_multiple)
    _, rows = visual_rows(layout, np.array([[0, layout.num_tokens]], dtype=np.int64))
    slots, _ = visual_rows(layout, np.array([[0, layout.num_tokens]], dtype=np.int64))
    owner_of_token = np.empty(layout.num_tokens, dtype=np.int64)
    for rank in range(cp):
        owner_of_token[shard_indices(layout.cu_seqlens, cp=cp, cp_rank=rank)] = rank
    encoder_of_tile = np.concatenate(
        [np.full(np.diff(tile_share(layout.num_tiles, cp, rank)), rank) for rank in range(cp)]
    )
    moves = np.zeros((cp, cp), dtype=np.int64)
    np.add.at(moves, (encoder_of_tile[rows // layout.tokens_per_tile], owner_of_token[slots]), 1)
    return moves


def router_table(sizes: StepSizes, options: argparse.Namespace) -> bool:
    """Bytes that the router sends against rows that change rank x hidden x bytes of an element."""
    met, hidden, dtype = True, 2048, torch.bfloat16
    for cp in (2, 4):
        moves = moving_rows(sizes, cp)
        np.fill_diagonal(moves, 0)
        print(
            f"router, cp {cp}, {sizes.tiles} tiles, hidden {hidden}, bfloat16 (hidden and dtype do not matter)"
        )
        for rank, counted in enumerate(on_ranks(routed, cp, sizes, hidden, dtype)):
            formula = [
                int(rows) * hidden * dtype.itemsize for rows in (moves[rank].sum(), moves[:, rank].sum())
            ]
            met = met and list(counted[:2]) == formula
            overhead = [
                written / max(wanted, 1) - 1 for written, wanted in zip(counted[2:], formula, strict=True)
            ]
            print(
                f"  rank {rank}: forward {counted[0]} bytes, formula {formula[0]}; backward {counted[1]}, formula "
                f"{formula[1]}; sockets {overhead[0]:+.2%}, {overhead[1]:+.2%} (headers)"
            )
    return met


PARTS = {
    "activations": activations,
    "options": option_table,
    "tiles": tile_table,
    "loss": loss_table,
    "router": router_table,
}


def main() -> int:
    """Parse the command line, measure the parts, say whether their targets were met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; nothing means all")
    defaults = StepSizes()
    for name in ("tokens", "tiles", "hidden", "layers", "vocab", "vision_hidden", "vision_layers"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes after one to warm up")
    parser.add_argument("--loss-hidden", type=int, default=512)
    parser.add_argument("--loss-vocab", type=int, default=16384)
    parser.add_argument("--loss-chunk", type=int, default=512)
    options = parser.parse_args()
    names = {field.name for field in dataclasses.fields(StepSizes)}
    sizes = StepSizes(**{name: value for name, value in vars(options).items() if name in names})
    # For the ranks: the profiler announces itself, and warns of tensors that are older than it, at every pass.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    torch.set_num_threads(1)
    print(machine())
    missed = [name for name in options.parts or PARTS if not PARTS[name](sizes, options)]
    print(f"MISSED: {', '.join(missed)}" if missed else "targets met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
