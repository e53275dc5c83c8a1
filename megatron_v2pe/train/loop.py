"""The training loop: open, build, resume, then for each step: data, update, metrics, checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.optimizer import Trainer, wrap_for_training
from megatron_v2pe.batch.packed_batch import PackedBatch
from megatron_v2pe.checkpoint.adapters.weights import draw_adapters
from megatron_v2pe.checkpoint.convert.load_hf import load_hf_weights
from megatron_v2pe.checkpoint.files.adapter_record import describe_adapters
from megatron_v2pe.checkpoint.files.folder import hf_path
from megatron_v2pe.checkpoint.load import load_checkpoint
from megatron_v2pe.checkpoint.resume import resume_point_in_full, verify_in_full
from megatron_v2pe.checkpoint.retention import remove_incomplete
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.model_state import load_model_weights
from megatron_v2pe.checkpoint.state.ranks import on_first_rank
from megatron_v2pe.config.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_required, validate
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import CheckpointError, DataError
from megatron_v2pe.core.files import explained_full_disk, writable_folder
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.data.loader import TrainLoader, explained_worker_deaths
from megatron_v2pe.data.media.images import NORMALIZATION
from megatron_v2pe.models.internvl import InternVL
from megatron_v2pe.parallel.shard_batch import shard_batch
from megatron_v2pe.parallel.topology import ParallelPlan, Ranks, init_distributed, resolve, shutdown
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.train.guards.bad_steps import BadSteps
from megatron_v2pe.train.guards.config_snapshot import write_config_snapshot
from megatron_v2pe.train.guards.damaged import DamagedSamples
from megatron_v2pe.train.guards.interruption import Interruption
from megatron_v2pe.train.guards.loss_guard import LossGuard
from megatron_v2pe.train.guards.run_lock import locked
from megatron_v2pe.train.guards.startup_checks import initial_state, model_folder, run_to_continue
from megatron_v2pe.train.metrics.metrics_log import MetricsLog
from megatron_v2pe.train.metrics.sinks import check_sinks, open_sinks
from megatron_v2pe.train.metrics.startup_timer import StartupTimer
from megatron_v2pe.train.metrics.step_metrics import StepMeter
from megatron_v2pe.train.monitoring.monitors import Monitors
from megatron_v2pe.train.monitoring.profiling import StepProfiler
from megatron_v2pe.train.monitoring.rank_monitor import RankMonitor
from megatron_v2pe.train.monitoring.watchdog import Watchdog, collective_timeout_minutes
from megatron_v2pe.train.saving import Saver
from megatron_v2pe.train.step import train_step

logger = logging.getLogger(__name__)


def train(config: RunConfig, *, peak_tflops: float | None = None) -> str:
    """Run `config` to its last step, from the newest checkpoint of its run folder when there is one.

    Args:
        config: the run.
        peak_tflops: dense bf16 peak of this device, for MFU; None where it is not known.

    Returns:
        What interrupted the run (see `interruption`), "" when it reached its last step.

    Raises:
        ConfigError, CheckpointError, DataError: a mistake of the user's, with the way out.
        TrainingError: loss or gradient stayed non-finite for too many steps.
    """
    startup = StartupTimer()
    startup.done("imports")
    check_required(config)
    check_sinks(config.runtime)
    arch = read_architecture(model_folder(config))
    plan = resolve(config.parallel, launcher().world_size)
    validate(config, arch, launcher().world_size)
    run_dir = writable_folder(config.runtime.run_dir, field="runtime.run_dir")
    with locked(run_dir, by_this_rank=launcher().rank == 0), explained_full_disk(run_dir):
        found = run_to_continue(config, run_dir)
        startup.done("checks")
        timeout = collective_timeout_minutes(config.runtime.hang_timeout_s)
        ranks = init_distributed(plan, seed=config.runtime.seed, timeout_minutes=timeout)
        # One answer for all: a rank may have looked while a run before this one was ending.
        resume_from = on_first_rank(lambda: found)
        startup.done("process groups")
        run = Run(config, arch, plan=plan, ranks=ranks, startup=startup, peak_tflops=peak_tflops)
        with Interruption(run.run_dir, ranks=ranks) as interruption, RankMonitor() as monitor:
            run.start(resume_from)
            with (
                final_without_progress(run),
                explained_worker_deaths(),
                run.monitors(interruption, monitor) as monitors,
                run.saver() as saver,
            ):
                reason = run.steps(interruption, monitors, saver)
        shutdown()  # not after an error: the others may be anywhere, and the launcher ends them
    return reason


@contextmanager
def final_without_progress(run: Run) -> Iterator[None]:
    """A file that could be read for some steps, or a loader process that had memory, may be there after a restart."""
    first = run.state.step
    try:
        yield
    except (DataError, CheckpointError) as error:
        error.is_final = run.state.step == first
        raise


class Run:
    """A training run on one rank.

    Args:
        config: the run.
        arch: architecture of the checkpoint.
        plan: sizes of the parallel axes.
        ranks: this rank's place in them.
        startup: tells how long the way to the first step took; None begins here.
        peak_tflops: see `train`.
    """

    def __init__(
        self,
        config: RunConfig,
        arch: InternVLArchitecture,
        *,
        plan: ParallelPlan,
        ranks: Ranks,
        startup: StartupTimer | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        self.config, self.arch = config, arch
        self.startup, self.peak_tflops = startup or StartupTimer(), peak_tflops
        self.plan, self.ranks = plan, ranks
        self.run_dir = Path(config.runtime.run_dir)
        self.hf_folder = (
            Path(config.model.hf_path) if config.model.hf_path else hf_path(config.model.checkpoint)
        )
        self.adapters = describe_adapters(config)
        self.trainer: Trainer
        self.state = initial_state(config)

    def start(self, resume_from: Path | None) -> None:
        """Build the model and bring it, the optimizer and the data to where the run stands."""
        resume_from = self._verified(resume_from)
        self.startup.done("checks")
        chunks = build_model(self.config, self.arch, plan=self.plan, ranks=self.ranks)
        self.startup.done("model")
        if resume_from is None or self.adapters is not None:  # whose checkpoints do not hold their base
            self._load_weights(chunks)
        self.startup.done("weights")
        self.trainer = wrap_for_training(chunks, self.config)
        self.startup.done("optimizer")
        saved = self._restore(resume_from) if resume_from is not None else None
        self.startup.done("checkpoint")
        self.loader = self._loader(start_step=saved.step if saved else 0)
        self.runner = self._micro_batch_runner()
        attach(self.runner, self.trainer.wrapped)
        self.state = replace(self.state, data_hash=self.loader.fingerprint, data_facts=self.loader.facts)
        self.damaged = DamagedSamples(
            run_dir=self.run_dir,
            ranks=self.ranks,
            num_bad=self.loader.num_bad,
            num_samples=self.loader.num_samples,
            max_share=self.config.data.max_bad_samples,
        )
        if saved is not None:
            saved.require_same_data(self.state, is_change_allowed=self.config.checkpoint.allow_changed_data)
            kept = {name: getattr(saved, name) for name in ("step", "consumed_packs", "recent_losses")}
            self.state = replace(self.state, **kept)
            logger.info("resumed from %s at step %d", resume_from, saved.step)
            if saved.step >= self.config.optim.steps:
                logger.warning("optim.steps is %d: nothing is left to train", self.config.optim.steps)
        if self.ranks.rank == 0:
            for left in remove_incomplete(self.run_dir):
                logger.info("deleted %s, left by an interrupted save", left)
            write_config_snapshot(self.run_dir, self.config, is_resumed=saved is not None)
            line = {"step": self.state.step, "world_size": self.ranks.world_size, "time": time.time()}
            append_json(self.run_dir / "starts.jsonl", line)
        self.startup.done("data")

    def _verified(self, resume_from: Path | None) -> Path | None:
        """Look at every byte that will be loaded where `checkpoint.verify` asks for it; the place to resume from."""
        if self.config.checkpoint.verify != "full":
            return resume_from
        loads_base = resume_from is None or self.adapters is not None
        if loads_base and not self.config.model.hf_path:  # whose files came without hashes
            verify_in_full(self.config.model.checkpoint, ranks=self.ranks)
        if resume_from is None:
            return None
        return resume_point_in_full(self.run_dir, fallback=self.config.checkpoint.fallback, ranks=self.ranks)

    def _load_weights(self, chunks: Sequence[InternVL]) -> None:
        model = self.config.model
        if model.hf_path:
            load_hf_weights(model.hf_path, chunks, ranks=self.ranks)
        else:
            load_model_weights(model.checkpoint, chunks, ranks=self.ranks)
        seed, lora = self.config.runtime.seed, self.config.lora
        draw_adapters(chunks, lora=lora, arch=self.arch, seed=seed, ranks=self.ranks)

    def _loader(self, *, start_step: int) -> TrainLoader:
        return TrainLoader(
            self.config,
            self.arch,
            self.hf_folder,
            dp_rank=self.ranks.dp_rank,
            dp=self.plan.dp,
            tile_rank=self.ranks.tile_rank,
            tile_ranks=self.plan.tile_ranks,
            holds_vision=self.ranks.is_first_stage,
            pad_to_multiple=self.plan.pad_to_multiple,
            start_step=start_step,
        )

    def _restore(self, folder: Path) -> RunState:
        """Bring weights, optimizer, generators and schedule to where a checkpoint stopped."""
        state = load_checkpoint(
            folder, model_chunks=self.trainer.wrapped, optimizer=self.trainer.optimizer, ranks=self.ranks
        )
        self.trainer.scheduler.load_state_dict(state.schedule)
        return state

    def _micro_batch_runner(self) -> MicroBatchRunner:
        mean, std = NORMALIZATION[self.config.data.normalize_type]
        shard = partial(
            shard_batch,
            plan=self.plan,
            ranks=self.ranks,
            device=self.ranks.device,
            dtype=DTYPES[self.config.runtime.dtype],
            mean=mean,
            std=std,
        )
        num_sources = len(self.loader.source_names)
        return MicroBatchRunner(shard=shard, device=self.ranks.device, num_sources=num_sources)

    def _meter(self) -> StepMeter:
        names = self.loader.source_names
        return StepMeter(self.arch, ranks=self.ranks, peak_tflops=self.peak_tflops, source_names=names)

    def _loss_guard(self) -> LossGuard:
        runtime, losses = self.config.runtime, self.state.recent_losses
        return LossGuard(max_ratio=runtime.max_loss_ratio, window=runtime.loss_window, losses=losses)

    def monitors(self, interruption: Interruption, monitor: RankMonitor) -> Monitors:
        """What looks at the steps that follow from outside."""
        watchdog = Watchdog(
            self.run_dir,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            timeout_s=self.config.runtime.hang_timeout_s,
            first_step=self.state.step + 1,
        )
        profiler = StepProfiler(
            self.run_dir,
            rank=self.ranks.rank,
            runtime=self.config.runtime,
            first_step=self.state.step + 1,
            last_step=self.config.optim.steps,
            is_asked=lambda: interruption.is_profile_agreed,
        )
        return Monitors(profiler, watchdog, told=monitor)  # the watchdog watches the writing of traces, too

    def saver(self) -> Saver:
        """Saves the steps that follow."""
        return Saver(
            self.config,
            self.trainer,
            ranks=self.ranks,
            hf_folder=self.hf_folder,
            adapters=self.adapters,
        )

    def steps(self, interruption: Interruption, monitors: Monitors, saver: Saver) -> str:
        """Train from the current step to the last, or to an interruption, whose reason is returned."""
        runtime = self.config.runtime
        sinks = open_sinks(runtime, self.run_dir, rank=self.ranks.rank, first_step=self.state.step + 1)
        log = MetricsLog(sinks, log_every=runtime.log_every, total_steps=self.config.optim.steps)
        bad_steps = BadSteps(run_dir=self.run_dir, ranks=self.ranks, max_in_row=runtime.max_bad_steps)
        meter = self._meter()
        guard = self._loss_guard()
        reason = ""
        for loaded, data_seconds in timed(self.loader):
            with meter.measured(self.state.step + 1):
                batches = self.damaged.settle(loaded, step=self.state.step + 1)
                limit = guard.limit
                report = train_step(self.trainer, self.runner, batches, ranks=self.ranks, loss_limit=limit)
            self.startup.after_step(self.run_dir, rank=self.ranks.rank, step_seconds=report.seconds)
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                consumed_packs=self.state.consumed_packs + self.loader.batches.size(self.state.step),
                recent_losses=guard.after(report),
            )
            num_bad = self.damaged.num_skipped
            metrics = meter.metrics(
                report, batches, step=self.state.step, data_seconds=data_seconds, bad_samples=num_bad
            )
            log.write(replace(metrics, save_s=saver.take_stall()))
            bad_steps.settle(report, batches, step=self.state.step)
            reason = interruption.agreed() if self.state.step < self.config.optim.steps else ""
            saver.after_step(self.state, is_interrupted=bool(reason), is_applied=report.is_applied)
            monitors.beat(self.state.step + 1)
            if reason:
                interruption.record(reason, step=self.state.step)
                break
        log.close()
        return reason


def timed(loader: TrainLoader) -> Iterator[tuple[list[PackedBatch], float]]:
    """Batches of each step with the seconds that were spent waiting for them."""
    iterator = iter(loader)
    while True:
        started = time.perf_counter()
        batches = next(iterator, None)
        if batches is None:
            return
        yield batches, time.perf_counter() - started
