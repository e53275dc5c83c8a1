"""The training loop: batches, update, metrics, checkpoint, monitors, for each step of a run."""

from __future__ import annotations

from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.data.loader import explained_worker_deaths
from megatron_v2pe.train.guards.final_errors import final_without_progress
from megatron_v2pe.train.metrics.step_metrics import timed_batches
from megatron_v2pe.train.setup import Outside, Run, build_run
from megatron_v2pe.train.step import train_step


def train(config: RunConfig, outside: Outside) -> str:
    """Run `config` to its last step, from the newest checkpoint of its run folder when there is one.

    Args:
        config: the run.
        outside: what the run gets from outside.

    Returns:
        What interrupted the run (see `interruption`), "" when it reached its last step.

    Raises:
        ConfigError, CheckpointError, DataError: a mistake of the user's, with the way out.
        TrainingError: loss or gradient stayed non-finite for too many steps.
    """
    with (
        build_run(config, outside) as run,
        final_without_progress(lambda: run.state.step),
        explained_worker_deaths(),
    ):
        return _stopped_before_first_step(run) or steps(run)


def _stopped_before_first_step(run: Run) -> str:
    """What asked to stop while the run was built, "" if nothing did. Collective."""
    if run.state.step >= run.config.optim.steps:
        return ""
    reason = run.interruption.agreed()
    if reason:
        run.interruption.record(reason, step=run.state.step)
        run.log.close()
    return reason


def steps(run: Run) -> str:
    """Train from the current step to the last, or to an interruption, whose reason is returned."""
    last_step = run.config.optim.steps
    reason = ""
    for loaded, data_s in timed_batches(run.loader):
        step = run.state.step + 1
        with run.meter.measured(step):
            batches = run.damaged.mask_damaged(loaded, step=step)
            limit = run.loss_guard.limit
            report = train_step(run.trainer, run.runner, batches, ranks=run.ranks, loss_limit=limit)
        run.advance(report)

        line = run.meter.line(report, batches, step=step, data_s=data_s)
        held_out = run.validation.after_step(step, run.trainer.wrapped)
        held_out |= run.retrieval.after_step(step, run.trainer.wrapped)
        own = {"bad_samples": run.damaged.num_skipped, "save_s": run.saver.take_pause()}
        run.log.write({**line, **own, **held_out})
        run.bad_steps.record(report, batches, step=step)

        asked = run.interruption
        reason = asked.agreed(wants_save=run.saver.is_time) if step < last_step else ""
        run.saver.after_step(
            run.state,
            is_interrupted=bool(reason),
            is_applied=report.is_applied,
            is_time=asked.is_save_agreed,
        )

        run.monitors.beat(step + 1)
        if reason:
            run.interruption.record(reason, step=step)
            break
    run.log.close()
    return reason
