"""What one GPU says in a few minutes: ceilings of its kernels, steps of true size against the plan, a profile.

    bash tools/gpu_session.sh [FOLDER]                      the whole session, with the tests
    python tools/gpu_session.py --out FOLDER --seconds 300  this part alone

    machine     versions, name of the device
    products    TFLOP/s of matrix products of the 2B model; the head's at 92,553 and at 92,608 columns
    attention   forward and backward by number of documents, both back ends
    steps       seconds, MFU and peak by length, recomputation and back end, beside what `plan` says
    profile     kernels of a step by name, and the places where the host waits

Weights are random. Rows go to session.json as they come, so that a session that is cut keeps what it has; session.md
shows them as tables. A measurement that fails leaves its error in its row. Exit code 1 when every one failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.environment import describe_environment, has_module
from megatron_v2pe.assembly.optim.optimizer import Trainer, wrap_for_training
from megatron_v2pe.batch.packed_batch import IGNORE_INDEX, PackedBatch
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, parse_architecture
from megatron_v2pe.config.arch.flops import PackCounts, step_flops
from megatron_v2pe.config.arch.published import PUBLISHED
from megatron_v2pe.config.schema import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PositionConfig,
    RunConfig,
    RuntimeConfig,
    VisionConfig,
)
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.topology import ParallelContext, ParallelPlan, init_distributed
from megatron_v2pe.planning.estimate import activation_peak
from megatron_v2pe.planning.memory.setting import Setting
from megatron_v2pe.planning.request.hardware import known_peak_tflops
from megatron_v2pe.planning.request.workload import Pack
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.train.step import train_step
from megatron_v2pe.v2pe.layout import SampleLayout, pack_layout

GIB = 2**30
VISUAL, SUPERVISED = 0.95, 0.05  # of the tokens
Row = dict[str, Any]


class Session:
    """Rows by part, written after each.

    Args:
        folder: where they are written.
        seconds: after which no further measurement begins.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self._end = time.monotonic() + seconds

    def measure(self, part: str, what: str, action: Callable[[], Row]) -> None:
        """Add the row of a measurement, or its error, or that there was no time."""
        row: Row = {"part": part, "what": what}
        started = time.monotonic()
        if started > self._end:
            row["error"] = "no time left"
        else:
            try:
                row.update(action())
            except Exception as error:  # one failure must not cost the session
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                torch.cuda.empty_cache()
        row["session_s"] = round(time.monotonic() - started, 2)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        self._write()

    def _write(self) -> None:
        write_atomic(self.folder / "session.json", json.dumps(self.rows, indent=1) + "\n")
        parts = dict.fromkeys(row["part"] for row in self.rows)
        write_atomic(self.folder / "session.md", "\n".join(map(self._table, parts)) + "\n")

    def _table(self, part: str) -> str:
        found = [row for row in self.rows if row["part"] == part]
        rows = [{name: value for name, value in row.items() if name != "part"} for row in found]
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_text(row.get(name, "")) for name in names] for row in rows]
        lines = [names, ["---"] * len(names), *cells]
        return f"## {part}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def timed(action: Callable[[], Any], rounds: int = 3) -> tuple[float, float]:
    """Seconds of the first call and of one later call, by the device's clock."""
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        action()
    end.record()
    torch.cuda.synchronize()
    return first, begin.elapsed_time(end) / rounds / 1e3


def product(m: int, n: int, k: int) -> Row:
    """[m, k] x [k, n] in bfloat16."""
    left, right = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    _, seconds = timed(lambda: left @ right)
    return {"m": m, "n": n, "k": k, "tflops": 2e-12 * m * n * k / seconds}


def products(session: Session, tokens: int) -> None:
    """The 2B model's products."""
    for what, n, k in (
        ("fc1", 16384, 2048),
        ("fc2", 2048, 8192),
        ("head", 92553, 2048),
        ("head, padded", 92608, 2048),
    ):
        session.measure("products", what, lambda n=n, k=k: product(min(tokens, 4096), n, k))


def attention(lengths: list[int], backend: str, arch: InternVLArchitecture, context: ParallelContext) -> Row:
    """Causal attention of packed documents through the core that a run uses."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_v2pe.assembly.backend_modules import choose_modules
    from megatron_v2pe.assembly.mcore_config import language_config
    from megatron_v2pe.batch.attention_params import V2PEPackedSeqParams

    config = run_config(backend=backend, recompute="none")
    core = choose_modules(config.parallel, dtype="bfloat16").language_attention(
        config=language_config(config, arch, context.plan),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type="p2p",
        pg_collection=context.ranks.groups,
    )
    bounds = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device="cuda")
    named = dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"), bounds
    )
    sizes = dict(max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths), document_lengths=tuple(lengths))
    params = V2PEPackedSeqParams(qkv_format="thd", **named, **sizes)
    language, tokens = arch.language, sum(lengths)
    query, key, value = (
        torch.randn(tokens, heads, language.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (language.num_heads, language.num_kv_heads, language.num_kv_heads)
    )

    def forward() -> torch.Tensor:
        return core(query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)

    out = forward()
    gradient = torch.randn_like(out)
    first, forward_s = timed(forward)
    _, backward_s = timed(lambda: torch.autograd.grad(out, (query, key, value), gradient, retain_graph=True))
    pairs = sum(float(length) ** 2 for length in lengths)
    flops = 2e-12 * language.num_heads * language.head_dim * pairs
    return {
        "documents": len(lengths),
        "forward_tflops": flops / forward_s,
        "backward_tflops": 2.5 * flops / backward_s,
        "first_s": first,
    }


def run_config(*, backend: str, recompute: str) -> RunConfig:
    """A run as the release's, but for what a session varies."""
    return RunConfig(
        model=ModelConfig(recompute=recompute),
        vision=VisionConfig(drop_path_rate=0.1, tile_multiple=8, recompute="full"),
        parallel=ParallelConfig(attention_backend=backend),
        position=PositionConfig(mode="v2pe_random"),
        optim=OptimConfig(steps=100, warmup_steps=1, lr=1e-6),
        runtime=RuntimeConfig(dtype="bfloat16"),
    )


def random_pack(arch: InternVLArchitecture, tokens: int) -> PackedBatch:
    """One document, images spread over it, labels at its end."""
    per_tile = arch.tokens_per_tile
    tiles = max(1, int(VISUAL * tokens) // per_tile)
    number, text = np.arange(tiles), tokens - tiles * per_tile
    sample = SampleLayout(
        num_tokens=tokens,
        image_starts=(number * per_tile + (number + 1) * text // (tiles + 1)).astype(np.int64),
        num_tiles=np.ones(tiles, np.int64),
        strides=np.full(tiles, 16, np.int64),
        tokens_per_tile=per_tile,
    )
    generator = np.random.default_rng(0)
    ids = generator.integers(0, arch.language.vocab_size, tokens)
    labels = np.roll(ids, -1)
    labels[: round((1 - SUPERVISED) * tokens)] = IGNORE_INDEX
    shape = (tiles, 3, arch.image_size, arch.image_size)
    return PackedBatch(
        tokens=ids,
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).astype(np.float32),
        layout=pack_layout([sample]),
        num_tiles=tiles,
        tile_range=(0, tiles),
        tiles=generator.integers(0, 256, shape, dtype=np.uint8),
        sample_ids=("random",),
    )


class Training:
    """A model of true width with random weights, and its steps."""

    def __init__(self, config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> None:
        self.config, self.arch, self.context = config, arch, context
        chunks = build_model(config, arch, context)
        with torch.no_grad():
            for name, parameter in chunks[0].named_parameters():
                is_scale = name.endswith(("norm.weight", "ls1", "ls2"))
                parameter.fill_(1.0) if is_scale else parameter.normal_(0.0, 0.02)
        self.trainer: Trainer = wrap_for_training(chunks, config)
        norm = NORMALIZATION[config.data.normalize_type]
        sharder = BatchSharder(context=context, dtype=torch.bfloat16, norm=norm)
        self.runner = MicroBatchRunner(shard=sharder.shard, device=context.ranks.device, rows=sharder.rows)
        attach(self.runner, self.trainer.wrapped)

    def step(self, batch: PackedBatch) -> float:
        """Loss of a step, with the update."""
        report = train_step(self.trainer, self.runner, [batch], ranks=self.context.ranks)
        torch.cuda.synchronize()
        return report.loss

    def measured(self, tokens: int) -> Row:
        """Three steps after the first, beside the plan's peak."""
        batch = random_pack(self.arch, tokens)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = self.step(batch)
        first = time.perf_counter() - started
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            self.step(batch)
            seconds.append(time.perf_counter() - started)
        counts = PackCounts(
            document_lengths=(tokens,),
            supervised_tokens=int((batch.labels != IGNORE_INDEX).sum()),
            num_tiles=batch.num_tiles,
        )
        tflops = 1e-12 * step_flops(self.arch, [counts]) / min(seconds)
        peak = known_peak_tflops(torch.cuda.get_device_name())
        return {
            "tokens": tokens,
            "tiles": batch.num_tiles,
            "loss": loss,
            "first_s": first,
            "step_s": min(seconds),
            "spread": max(seconds) / min(seconds),
            "mfu": tflops / peak if peak else "unknown device",
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "planned_activations_gib": self.planned(counts) / GIB,
        }

    def planned(self, counts: PackCounts) -> float:
        """Activations at their peak, as `plan` counts them; weights, gradients and Adam are beside them."""
        pack = Pack(
            document_lengths=counts.document_lengths,
            supervised_tokens=counts.supervised_tokens,
            num_tiles=counts.num_tiles,
            source="random",
        )
        native = self.config.parallel.attention_backend == "native" or not has_module("transformer_engine")
        backend = "native" if native else "transformer_engine"
        setting = Setting(
            config=self.config, arch=self.arch, plan=self.context.plan, pack=pack, backend=backend
        )
        return activation_peak(setting).total_bytes

    def profiled(self, tokens: int, folder: Path) -> Row:
        """Kernels by time into profile.txt; places where the host waits."""
        from torch.profiler import ProfilerActivity, profile

        batch = random_pack(self.arch, tokens)
        self.step(batch)
        places = sorted(set(self.waits(batch)))
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.step(batch)
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=60)
        write_atomic(folder / "profile.txt", table)
        return {"tokens": tokens, "waits": len(places), "places": ", ".join(places)}

    def waits(self, batch: PackedBatch) -> Iterator[str]:
        """File and line of each wait of a step."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.step(batch)
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                yield f"{Path(warning.filename).name}:{warning.lineno}"


def steps(
    session: Session, args: argparse.Namespace, arch: InternVLArchitecture, context: ParallelContext
) -> None:
    """The first kind of run at all lengths, the others at the first."""
    engine = "transformer_engine" if has_module("transformer_engine") else "native"
    kinds = [(engine, "selective", args.tokens)]
    kinds += [(engine, recompute, args.tokens[:1]) for recompute in ("none", "full")]
    kinds += [("native", "selective", args.tokens[:1])] if engine != "native" else []
    for backend, recompute, lengths in kinds:
        made: list[Training] = []

        def training(
            backend: str = backend, recompute: str = recompute, made: list[Training] = made
        ) -> Training:
            if not made:
                made.append(Training(run_config(backend=backend, recompute=recompute), arch, context))
            return made[0]

        for tokens in lengths:
            session.measure(
                "steps", f"{backend}, {recompute}", lambda n=tokens, get=training: get().measured(n)
            )
        if recompute == "selective" and backend == engine:
            profiled = partial(Training.profiled, tokens=args.tokens[0], folder=args.out)
            session.measure("profile", backend, lambda run=profiled, get=training: run(get()))
        made.clear()
        torch.cuda.empty_cache()


def architecture(args: argparse.Namespace) -> InternVLArchitecture:
    """InternVL2-2B, with fewer layers where asked."""
    arch = parse_architecture(PUBLISHED["2B"])
    language = dataclasses.replace(arch.language, num_layers=args.layers or arch.language.num_layers)
    vision = dataclasses.replace(arch.vision, num_layers=args.vision_layers or arch.vision.num_layers)
    return dataclasses.replace(arch, language=language, vision=vision)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of session.json, session.md and profile.txt"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="no measurement begins later (default 300)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[32768, 65536, 131072], help="lengths of the steps"
    )
    parser.add_argument("--layers", type=int, default=0, help="decoder layers (default: all 24)")
    parser.add_argument("--vision-layers", type=int, default=0, help="tower layers (default: all 24)")
    return parser.parse_args()


def main() -> int:
    """Run all parts; 1 when every measurement failed, 2 without a GPU."""
    args = parse()
    if not torch.cuda.is_available():
        print("gpu_session: torch sees no CUDA device")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args.out, args.seconds)
    session.measure("machine", "versions", lambda: dict(describe_environment()))
    products(session, args.tokens[0])
    arch, context = architecture(args), init_distributed(ParallelPlan(), seed=0)
    for backend in (["transformer_engine"] if has_module("transformer_engine") else []) + ["native"]:
        for documents in (1, 8, 32, 320):
            lengths = [args.tokens[0] // documents // 2 * 2] * documents
            session.measure("attention", backend, lambda n=lengths, b=backend: attention(n, b, arch, context))
    steps(session, args, arch, context)
    failed = [row for row in session.rows if "error" in row]
    for line in text_table(None, [[row["part"], row["what"], row["error"]] for row in failed], align="<"):
        print(line)
    print(f"{len(session.rows) - len(failed)} of {len(session.rows)} measurements; {args.out / 'session.md'}")
    return 1 if len(failed) == len(session.rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
