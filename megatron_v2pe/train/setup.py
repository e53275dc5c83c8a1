"""Everything that the steps of a run need, built in order before the first of them.

checks that no rank waits for --> lock of the run folder --> process groups --> requests from outside are noted
--> model --> weights --> optimizer --> checkpoint --> data --> monitors, saver --> Run
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from megatron_v2pe.assembly.build import build_model
from megatron_v2pe.assembly.mcore_config import DTYPES
from megatron_v2pe.assembly.optim.optimizer import Trainer, wrap_for_training
from megatron_v2pe.checkpoint.files.adapter_record import describe_adapters
from megatron_v2pe.checkpoint.files.folder import expert_bias_of
from megatron_v2pe.checkpoint.load import load_checkpoint
from megatron_v2pe.checkpoint.model_loading import load_initial_weights
from megatron_v2pe.checkpoint.resume import resume_point_in_full, verify_in_full
from megatron_v2pe.checkpoint.retention import remove_incomplete
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.ranks import on_first_rank
from megatron_v2pe.config.arch.architecture import InternVLArchitecture, read_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.validate import check_required, validate
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.files import explained_full_disk, remove_leftovers, writable_folder
from megatron_v2pe.core.jsonl import append_json
from megatron_v2pe.core.open_files import require_open_files
from megatron_v2pe.data.loader import TrainLoader
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.pack_reader import TileShare
from megatron_v2pe.data.samples.settings import sample_settings
from megatron_v2pe.data.validation import ValidationPacks
from megatron_v2pe.parallel.agreement import Facts, require_equal_in_world
from megatron_v2pe.parallel.batch_sharder import BatchSharder
from megatron_v2pe.parallel.shards import sharding_of
from megatron_v2pe.parallel.topology import (
    Joining,
    ParallelContext,
    ParallelPlan,
    Ranks,
    init_distributed,
    resolve,
    shutdown,
)
from megatron_v2pe.train.forward_step import MicroBatchRunner, attach
from megatron_v2pe.train.guards.bad_steps import BadSteps
from megatron_v2pe.train.guards.config_snapshot import write_config_snapshot
from megatron_v2pe.train.guards.damaged import DamagedSamples
from megatron_v2pe.train.guards.determinism import deterministic_algorithms
from megatron_v2pe.train.guards.interruption import Interruption
from megatron_v2pe.train.guards.loss_guard import LossGuard
from megatron_v2pe.train.guards.rank_facts import folder_facts, rank_facts
from megatron_v2pe.train.guards.run_lock import locked
from megatron_v2pe.train.guards.startup_checks import (
    hf_folder_of,
    initial_state,
    model_folder,
    require_learning_pyramid,
    require_usable_folder,
    run_to_continue,
)
from megatron_v2pe.train.introduction import SizesOf, check_room, describe_data, introduction
from megatron_v2pe.train.metrics.metrics_log import MetricsLog
from megatron_v2pe.train.metrics.sinks import check_sinks, open_sinks
from megatron_v2pe.train.metrics.startup_timer import StartupTimer
from megatron_v2pe.train.metrics.step_metrics import StepMeter
from megatron_v2pe.train.monitoring.monitors import Monitors
from megatron_v2pe.train.monitoring.profiling import StepProfiler
from megatron_v2pe.train.monitoring.rank_monitor import RankMonitor
from megatron_v2pe.train.monitoring.startup_watch import StartupWatch
from megatron_v2pe.train.monitoring.watchdog import Watchdog, collective_timeout_minutes
from megatron_v2pe.train.retrieval import Retrieval
from megatron_v2pe.train.saving import Saver
from megatron_v2pe.train.step import StepReport
from megatron_v2pe.train.validation import Validation

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """A training run on one rank, ready for its next step; leaving it releases all that it holds.

    Attributes:
        config: the run as configured.
        run_dir: its folder.
        ranks: this rank's place.
        trainer: model chunks, optimizer, schedule.
        loader: this data parallel rank's packs, from the next step on.
        runner: runs micro batches through this stage.
        validation: loss of held-out data, when it is due.
        retrieval: answers to held-out questions, when they are due.
        damaged: removes damaged samples from the loss.
        loss_guard: how large the next loss may be.
        bad_steps: records steps that were not applied.
        meter: makes the metrics of a step.
        log: where they go.
        startup: times of the phases up to the first step.
        saver: saves checkpoints.
        interruption: requests from outside.
        monitors: what observes the steps.
        state: what a checkpoint keeps besides tensors, as of the last step.
        resources: what is released at the end, in reverse order.
    """

    config: RunConfig
    run_dir: Path
    ranks: Ranks
    trainer: Trainer
    loader: TrainLoader
    runner: MicroBatchRunner
    validation: Validation
    retrieval: Retrieval
    damaged: DamagedSamples
    loss_guard: LossGuard
    bad_steps: BadSteps
    meter: StepMeter
    log: MetricsLog
    startup: StartupTimer
    saver: Saver
    interruption: Interruption
    monitors: Monitors
    state: RunState
    resources: ExitStack

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resources.__exit__(kind, error, trace)

    def advance(self, report: StepReport) -> None:
        """Count a step that was done."""
        self.startup.after_step(self.run_dir, rank=self.ranks.rank, step_seconds=report.seconds)
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            consumed_packs=self.state.consumed_packs + self.loader.batches.size(self.state.step),
            recent_losses=self.loss_guard.after(report),
        )


@dataclass(frozen=True, kw_only=True)
class Outside:
    """What a run gets from rooms that it does not know, or from whoever started it.

    Attributes:
        sizes_of: counts parameters and bytes.
        peak_tflops: dense bf16 peak of this device, for MFU; None where it is not known.
        watch: ends a start that hangs; it is stopped where the watchdog of the steps begins.
    """

    sizes_of: SizesOf
    peak_tflops: float | None = None
    watch: StartupWatch | None = None


def build_run(config: RunConfig, outside: Outside) -> Run:
    """Build a run, at the newest checkpoint of its run folder when there is one; a context manager. Collective.

    Args:
        config: the run.
        outside: what it gets from outside.

    Raises:
        ConfigError, CheckpointError, DataError: a mistake of the user's, with the way out.
    """
    startup = StartupTimer(outside.watch.done if outside.watch is not None else None)
    startup.done("imports")
    arch, plan, run_dir = _checked(config)
    with ExitStack() as stack:
        stack.enter_context(locked(run_dir, by_this_rank=launcher().rank == 0))
        stack.enter_context(explained_full_disk(run_dir))
        found = run_to_continue(config, run_dir)
        stack.enter_context(deterministic_algorithms(is_wanted=config.runtime.deterministic))
        facts = rank_facts(config, arch) if plan.world_size > 1 else None
        startup.done("checks")
        context = stack.enter_context(_world(config, plan, facts=facts))
        ranks = context.ranks
        resume_from = _agreed(found)
        startup.done("process groups")
        interruption = stack.enter_context(Interruption(run_dir, ranks=ranks))
        rank_monitor = stack.enter_context(RankMonitor())
        _introduce(config, arch, plan, run_dir, resume_from=resume_from, sizes_of=outside.sizes_of)
        resume_from = _verified(config, run_dir, resume_from, ranks=ranks)
        startup.done("checks")
        trainer = _trainer(config, arch, context, resume_from=resume_from, startup=startup)
        saved = _restored(resume_from, trainer, ranks=ranks)
        startup.done("checkpoint")
        loader = _loader(config, arch, context, start_step=saved.step if saved else 0)
        state = _state(config, loader, saved, resume_from)
        _record_start(config, run_dir, state, ranks=ranks, is_resumed=saved is not None)
        monitors = stack.enter_context(_monitors(config, run_dir, state, interruption, rank_monitor, ranks))
        _started(config, loader, startup, outside)
        return Run(
            config=config,
            run_dir=run_dir,
            ranks=ranks,
            trainer=trainer,
            loader=loader,
            runner=_micro_batch_runner(loader, trainer, _sharder(config, arch, context)),
            validation=_validation(config, arch, context, monitors),
            retrieval=_retrieval(config, arch, context, monitors),
            damaged=_damaged_samples(config, loader, run_dir, ranks=ranks),
            loss_guard=_loss_guard(config, state),
            bad_steps=BadSteps(run_dir=run_dir, ranks=ranks, max_in_row=config.runtime.max_bad_steps),
            meter=StepMeter(arch, ranks=ranks, peak_tflops=outside.peak_tflops),
            log=_metrics_log(config, run_dir, state, ranks=ranks),
            startup=startup,
            interruption=interruption,
            monitors=monitors,
            saver=stack.enter_context(_saver(config, trainer, loader, ranks=ranks)),
            state=state,
            resources=stack.pop_all(),
        )


def _agreed(found: Path | None) -> Path | None:
    """One answer for all: a rank may have looked while a run before this one was ending. Collective."""
    resume_from = on_first_rank(lambda: found)
    if resume_from is not None:
        require_equal_in_world(folder_facts(resume_from))
    return resume_from


def _started(config: RunConfig, loader: TrainLoader, startup: StartupTimer, outside: Outside) -> None:
    """Report the data, and leave the watch over this process to the watchdog of the steps."""
    startup.done("data")
    logger.info("%s", describe_data(config, loader))
    if outside.watch is not None:
        outside.watch.stop()


def _checked(config: RunConfig) -> tuple[InternVLArchitecture, ParallelPlan, Path]:
    """Architecture, plan and run folder, after all checks that read no data, and no weights but gates."""
    world_size = launcher().world_size
    check_required(config)
    check_sinks(config.runtime)
    arch = read_architecture(model_folder(config))
    plan = resolve(config.parallel, world_size)
    validate(config, arch, world_size)
    require_learning_pyramid(config, arch)
    sample_settings(config, arch, hf_folder_of(config))  # tokenizer, template and embedding fit each other
    require_open_files()
    run_dir = writable_folder(config.runtime.run_dir, field="runtime.run_dir")
    require_usable_folder(run_dir)
    return arch, plan, run_dir


@contextmanager
def _world(config: RunConfig, plan: ParallelPlan, *, facts: Facts | None) -> Iterator[ParallelContext]:
    """Process groups of the run. After an error they are left alone: other ranks may be anywhere in theirs."""
    hang_s = config.runtime.hang_timeout_s
    timeout = collective_timeout_minutes(hang_s)
    # torch tries to connect for up to twice its limit; the message about it comes before the watch ends the process.
    joining = Joining(timeout_s=0.3 * hang_s if hang_s else None, facts=facts)
    yield init_distributed(plan, seed=config.runtime.seed, timeout_minutes=timeout, joining=joining)
    shutdown()


def _introduce(
    config: RunConfig,
    arch: InternVLArchitecture,
    plan: ParallelPlan,
    run_dir: Path,
    *,
    resume_from: Path | None,
    sizes_of: SizesOf,
) -> None:
    """Say what is about to happen, and refuse a disk without room for a checkpoint. Collective."""
    sizes = sizes_of(config, arch)
    text = introduction(
        config,
        plan=plan,
        architecture=arch.language.architecture,
        template=arch.template,
        sizes=sizes,
        resume_from=resume_from,
    )
    logger.info("%s", text)
    on_first_rank(lambda: check_room(config, run_dir, sizes))


def _verified(config: RunConfig, run_dir: Path, resume_from: Path | None, *, ranks: Ranks) -> Path | None:
    """Read every byte that will be loaded where `checkpoint.verify` asks for it; the checkpoint to resume from."""
    if config.checkpoint.verify != "full":
        return resume_from
    if _needs_initial_weights(config, resume_from) and not config.model.hf_path:  # whose files have no hashes
        verify_in_full(config.model.checkpoint, ranks=ranks)
    if resume_from is None:
        return None
    return resume_point_in_full(run_dir, fallback=config.checkpoint.fallback, ranks=ranks)


def _needs_initial_weights(config: RunConfig, resume_from: Path | None) -> bool:
    """A checkpoint of adapters does not hold the weights of its base."""
    return resume_from is None or config.lora.is_on


def _trainer(
    config: RunConfig,
    arch: InternVLArchitecture,
    context: ParallelContext,
    *,
    resume_from: Path | None,
    startup: StartupTimer,
) -> Trainer:
    """Model, weights that no checkpoint of the run will bring, optimizer."""
    model_chunks = build_model(config, arch, context)
    startup.done("model")
    if _needs_initial_weights(config, resume_from):
        load_initial_weights(model_chunks, config, arch, ranks=context.ranks)
    startup.done("weights")
    trainer = wrap_for_training(model_chunks, config)
    if config.model.checkpoint and resume_from is None:
        trainer.expert_bias.load(expert_bias_of(config.model.checkpoint))
    startup.done("optimizer")
    return trainer


def _restored(folder: Path | None, trainer: Trainer, *, ranks: Ranks) -> RunState | None:
    """Load weights, optimizer, generators and schedule of a checkpoint; None for a new run."""
    if folder is None:
        return None
    state = load_checkpoint(folder, model_chunks=trainer.wrapped, optimizer=trainer.optimizer, ranks=ranks)
    trainer.scheduler.load_state_dict(state.schedule)
    trainer.expert_bias.load(state.expert_bias)
    return state


def _loader(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext, *, start_step: int
) -> TrainLoader:
    plan, ranks = context.plan, context.ranks
    return TrainLoader(
        config,
        arch,
        hf_folder_of(config),
        dp_rank=ranks.dp_rank,
        dp=plan.dp,
        tile_rank=ranks.tile_rank,
        tile_ranks=plan.tile_ranks,
        holds_vision=ranks.is_first_stage,
        pad_to_multiple=plan.pad_to_multiple,
        start_step=start_step,
    )


def _state(
    config: RunConfig, loader: TrainLoader, saved: RunState | None, resume_from: Path | None
) -> RunState:
    """State of the run as configured now, with the progress of the checkpoint that it continues from.

    Raises:
        ConfigError: the data changed since, and `checkpoint.allow_changed_data` is false.
    """
    state = replace(initial_state(config), data_hash=loader.fingerprint, data_facts=loader.facts)
    if saved is None:
        return state
    saved.require_same_data(state, is_change_allowed=config.checkpoint.allow_changed_data)
    logger.info("resumed from %s at step %d", resume_from, saved.step)
    if saved.step >= config.optim.steps:
        logger.warning("optim.steps is %d: nothing is left to train", config.optim.steps)
    return replace(
        state, step=saved.step, consumed_packs=saved.consumed_packs, recent_losses=saved.recent_losses
    )


def _record_start(
    config: RunConfig, run_dir: Path, state: RunState, *, ranks: Ranks, is_resumed: bool
) -> None:
    """Clean the run folder and note the start in it; rank 0 alone does."""
    if ranks.rank != 0:
        return
    begin = psutil.Process().create_time()
    folders = (run_dir, run_dir / "checkpoints", run_dir / "heartbeats")
    for left in [each for folder in folders for each in remove_leftovers(folder, before=begin)]:
        logger.info("deleted %s, left by a killed process", left)
    for left in remove_incomplete(run_dir):
        logger.info("deleted %s, left by an interrupted save", left)
    write_config_snapshot(run_dir, config, is_resumed=is_resumed)
    line = {"step": state.step, "world_size": ranks.world_size, "time": time.time()}
    append_json(run_dir / "starts.jsonl", line)


def _sharder(config: RunConfig, arch: InternVLArchitecture, context: ParallelContext) -> BatchSharder:
    """How a pack becomes this rank's share."""
    return BatchSharder(
        context=context,
        dtype=DTYPES[config.runtime.dtype],
        norm=NORMALIZATION[config.data.normalize_type],
        sharding=sharding_of(config.parallel, arch),
    )


def _micro_batch_runner(loader: TrainLoader, trainer: Trainer, sharder: BatchSharder) -> MicroBatchRunner:
    runner = MicroBatchRunner(
        shard=sharder.shard,
        device=sharder.context.ranks.device,
        rows=sharder.rows,
        source_names=tuple(loader.source_names),
    )
    attach(runner, trainer.wrapped)
    return runner


def _held_out_packs(
    meta: str, field: str, config: RunConfig, arch: InternVLArchitecture, context: ParallelContext
) -> ValidationPacks | None:
    """Packs of this rank of held-out data; None where a field names none."""
    if not meta:
        return None
    plan, ranks = context.plan, context.ranks
    packs = ValidationPacks(
        meta,
        config,
        arch,
        hf_folder_of(config),
        dp_rank=ranks.dp_rank,
        dp=plan.dp,
        tile_share=TileShare(
            rank=ranks.tile_rank, num_ranks=plan.tile_ranks, holds_vision=ranks.is_first_stage
        ),
        pad_to_multiple=plan.pad_to_multiple,
        runs_multiple=plan.pp if config.parallel.vpp > 1 else 1,
        field=field,
    )
    logger.info("%s: %d samples in %d packs", field, packs.num_samples, packs.num_packs)
    return packs


def _validation(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext, monitors: Monitors
) -> Validation:
    """Held-out packs, and a runner that keeps their groups apart."""
    packs = _held_out_packs(config.data.validation, "data.validation", config, arch, context)
    names = tuple(f"{group.source} {group.length_name}" for group in packs.groups) if packs else ()
    shard, device = _sharder(config, arch, context).shard, context.ranks.device
    return Validation(
        packs=packs,
        every=config.runtime.validate_every,
        last_step=config.optim.steps,
        runner=MicroBatchRunner(shard=shard, device=device, source_names=names),
        ranks=context.ranks,
        pp=context.plan.pp,
        on_progress=monitors.keep_alive,
    )


def _retrieval(
    config: RunConfig, arch: InternVLArchitecture, context: ParallelContext, monitors: Monitors
) -> Retrieval:
    return Retrieval(
        packs=_held_out_packs(config.data.retrieval, "data.retrieval", config, arch, context),
        every=config.runtime.evaluate_every,
        last_step=config.optim.steps,
        shard=_sharder(config, arch, context).shard,
        ranks=context.ranks,
        pp=context.plan.pp,
        on_progress=monitors.keep_alive,
    )


def _damaged_samples(
    config: RunConfig, loader: TrainLoader, run_dir: Path, *, ranks: Ranks
) -> DamagedSamples:
    return DamagedSamples(
        run_dir=run_dir,
        ranks=ranks,
        num_bad=loader.num_bad,
        num_samples=loader.num_samples,
        max_share=config.data.max_bad_samples,
    )


def _loss_guard(config: RunConfig, state: RunState) -> LossGuard:
    return LossGuard(
        max_ratio=config.runtime.max_loss_ratio,
        window=config.runtime.loss_window,
        losses=state.recent_losses,
    )


def _metrics_log(config: RunConfig, run_dir: Path, state: RunState, *, ranks: Ranks) -> MetricsLog:
    sinks = open_sinks(config.runtime, run_dir, rank=ranks.rank, first_step=state.step + 1)
    return MetricsLog(sinks, log_every=config.runtime.log_every, total_steps=config.optim.steps)


def _monitors(
    config: RunConfig,
    run_dir: Path,
    state: RunState,
    interruption: Interruption,
    rank_monitor: RankMonitor,
    ranks: Ranks,
) -> Monitors:
    """What observes the steps; the watchdog observes the writing of traces, too."""
    profiler = StepProfiler(
        run_dir,
        rank=ranks.rank,
        runtime=config.runtime,
        first_step=state.step + 1,
        last_step=config.optim.steps,
        is_asked=lambda: interruption.is_profile_agreed,
    )
    watchdog = Watchdog(
        run_dir,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout_s=config.runtime.hang_timeout_s,
        first_step=state.step + 1,
    )
    return Monitors(profiler, watchdog, entered=rank_monitor)


def _saver(config: RunConfig, trainer: Trainer, loader: TrainLoader, *, ranks: Ranks) -> Saver:
    return Saver(
        config,
        trainer,
        ranks=ranks,
        hf_folder=hf_folder_of(config),
        adapters=describe_adapters(config),
        system=loader.system_text,
    )
