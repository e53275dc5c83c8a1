"""Where a run's numbers go: metrics.jsonl always, TensorBoard if wanted, a heartbeat line for people.

Rank 0 writes. Counts are those of the global batch; the other data parallel ranks' packs are counted by a
sum over ranks, so every line is the same whatever the layout.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.architecture import InternVLArchitecture
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import append_json, read_jsonl
from megatron_v2pe.models.flops import PackCounts, step_flops
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl. Tokens exclude padding of documents; rates are over the whole world.

    `data_digest` is the sum of digests of the packs' samples: equal digests mean equal packs, whichever rank took them;
    `bad_samples` counts those that are skipped so far, found while measuring or while training. Of a step that was not
    applied, numbers that are not finite are None (null in json).
    """

    step: int
    is_applied: bool
    loss: float | None
    grad_norm: float | None
    grad_norm_vision: float | None
    grad_norm_projector: float | None
    grad_norm_language: float | None
    lr: float
    tokens: int
    visual_tokens: int
    samples: int
    bad_samples: int
    data_digest: str
    tokens_per_s: float
    tflops_per_rank: float
    step_s: float
    data_s: float
    peak_mem_gib: float


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """Sums over the packs of a global batch, and a digest of their samples' identities."""

    tokens: int
    visual_tokens: int
    samples: int
    flops: float
    data_digest: str


def count_batches(
    batches: Sequence[PackedBatch], arch: InternVLArchitecture, *, ranks: Ranks, device: torch.device
) -> BatchCounts:
    """Count this data parallel rank's packs and sum over data parallel ranks."""
    documents = [document for batch in batches for document in batch.layout.documents]
    packs = [
        PackCounts(
            document_lengths=tuple((batch.layout.cu_seqlens[1:] - batch.layout.cu_seqlens[:-1]).tolist()),
            supervised_tokens=int((batch.labels != IGNORE_INDEX).sum()),
            num_tiles=batch.num_tiles,
        )
        for batch in batches
    ]
    counts = torch.tensor(
        [
            sum(document.num_tokens for document in documents),
            sum(document.num_visual_tokens for document in documents),
            len(documents),
            step_flops(arch, packs),
            sum(_pack_digest(batch.sample_ids) for batch in batches),
        ],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(counts, group=ranks.groups.dp)
    tokens, visual, samples, flops, digest = counts.tolist()
    return BatchCounts(
        tokens=int(tokens),
        visual_tokens=int(visual),
        samples=int(samples),
        flops=flops,
        data_digest=f"{int(digest):x}",
    )


def _pack_digest(sample_ids: Sequence[str]) -> int:
    """38 bits of the samples of a pack, in order; 2**15 of them add up exactly in float64."""
    digest = hashlib.blake2b("\n".join(sample_ids).encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little") >> 2


def peak_memory_gib() -> float:
    """Most memory of this process so far: allocated device memory, or resident memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def finite(value: float) -> float | None:
    """The number, or None where json has no spelling for it."""
    return value if math.isfinite(value) else None


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def _drop_lines_from(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl before `step`; a run killed after its last checkpoint wrote more."""
    if path.exists():
        kept = [line for _, line in read_jsonl(path) if line["step"] < step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


class MetricsLog:
    """Writes one step's metrics everywhere; on ranks other than 0 it does nothing.

    Args:
        run_dir: folder of the run.
        rank: global rank.
        tensorboard: also write <run_dir>/tensorboard.
        log_every: steps between heartbeat lines.
        total_steps: for the estimate of the time left.
        first_step: step that is written first; lines of a resumed run from there on are dropped, because
            those steps are done again.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        tensorboard: bool,
        log_every: int,
        total_steps: int,
        first_step: int,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.is_writer, self.log_every, self.total_steps = rank == 0, log_every, total_steps
        self.board: Any = None
        self.seconds_per_step = 0.0
        if self.is_writer:
            _drop_lines_from(self.path, first_step)
        if self.is_writer and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, metrics: StepMetrics) -> None:
        """Append to metrics.jsonl, add curve points, print the heartbeat when due."""
        if not self.is_writer:
            return
        append_json(self.path, asdict(metrics))
        if self.board is not None:
            for name, value in asdict(metrics).items():
                if name != "step" and isinstance(value, int | float):
                    self.board.add_scalar(f"train/{name}", value, metrics.step)
        seconds = metrics.step_s + metrics.data_s
        self.seconds_per_step = (
            seconds if self.seconds_per_step == 0 else 0.9 * self.seconds_per_step + 0.1 * seconds
        )
        if metrics.step % self.log_every == 0 or metrics.step == self.total_steps:
            logger.info(self._heartbeat(metrics))

    def _heartbeat(self, metrics: StepMetrics) -> str:
        left = round((self.total_steps - metrics.step) * self.seconds_per_step)
        return (
            f"step {metrics.step}/{self.total_steps}  loss {_shown(metrics.loss, 4)}  "
            f"grad norm {_shown(metrics.grad_norm, 3)}  lr {metrics.lr:.2e}  "
            f"{metrics.tokens_per_s:,.0f} tokens/s  step {metrics.step_s:.2f} s  data {metrics.data_s:.2f} s  "
            f"memory {metrics.peak_mem_gib:.1f} GiB  left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )

    def close(self) -> None:
        """Flush the curves."""
        if self.board is not None:
            self.board.close()
