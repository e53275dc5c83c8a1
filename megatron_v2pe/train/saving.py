"""When a run saves, and how long training pauses for it.

    step 10 done -> plan, copy this rank's state to host memory     training pauses
    step 11         thread of each rank: hash and write the copy
    step 12 done -> all ranks have written: report to rank 0        training pauses
    step 13         thread of rank 0: .metadata, hf/, checkpoint.json, rename, latest, delete old ones
    step 13 done -> rank 0 is done: `saved ...` in the log

A save is due every checkpoint.save_every steps or, where that is 0, when checkpoint.save_minutes have passed by the
clock of any rank, on which all agree between steps.

So it is with checkpoint.async_save; without, and for the last step and an interruption, all is done after the step. At
most one save is under way, so a rank needs one copy of its state in host memory and never more. While a save is under
way, one number is reduced over all ranks between steps, which says whether all are ready for its next part. All
collectives of a save are called by the main thread, between steps.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

from megatron_v2pe.assembly.optim.optimizer import Trainer, make_moments
from megatron_v2pe.checkpoint.files.adapter_record import AdapterRecord
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.save import CheckpointSave
from megatron_v2pe.checkpoint.state.host_memory import HostCopy, shortage
from megatron_v2pe.checkpoint.state.save import KnownPlan
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.config.trained_settings import trained_values
from megatron_v2pe.core.errors import CheckpointError, TrainingError
from megatron_v2pe.parallel.topology import Ranks

logger = logging.getLogger(__name__)

_FAILED, _BUSY, _READY = -1, 0, 1
_ABANDON_SECONDS = 10.0  # for a thread whose disk hangs; it ends with the process


class Saver:
    """Saves one run. Every rank calls `after_step` after every step, or a collective is met by some ranks only.

    Use it as a context manager around the steps: an error that all ranks raise together (`TrainingError`) still
    finishes the save under way, any other abandons it, as the other ranks may be anywhere.

    Args:
        config: the run.
        trainer: what is saved.
        ranks: this rank's place.
        hf_folder: Hugging Face side files of the model.
        adapters: of a run that trains adapters.
        system: system text of all samples, empty for the template's; None where they differ.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        *,
        ranks: Ranks,
        hf_folder: Path,
        adapters: AdapterRecord | None = None,
        system: str | None = None,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._ranks = ranks
        self._hf_folder = hf_folder
        self._adapters = adapters
        self._trained = trained_values(config, read_architecture(hf_folder), system=system)
        self._is_memory_known = False
        self._memory = (
            HostCopy(is_pinned=ranks.device.type == "cuda") if config.checkpoint.async_save else None
        )
        self._under_way: _SaveUnderWay | None = None
        self._known: KnownPlan | None = None
        self._paused_s = 0.0
        self._saved_at = time.monotonic()
        self._is_owed = False

    @property
    def is_time(self) -> bool:
        """Whether a checkpoint is due by the clock of this rank; without checkpoint.save_every only."""
        settings = self._config.checkpoint
        if settings.save_every or not settings.save_minutes or self._under_way is not None:
            return False
        return time.monotonic() - self._saved_at >= 60 * settings.save_minutes

    def after_step(
        self, state: RunState, *, is_interrupted: bool, is_applied: bool = True, is_time: bool = False
    ) -> None:
        """Finish or start what is due after a step. Collective.

        Args:
            state: of the run after this step, without the schedule.
            is_interrupted: the run ends here, before its last step.
            is_applied: the step changed the weights. A save that is due after one that did not waits for the next
                that does: saves of a run that has gone wrong would replace good ones.
            is_time: `is_time` of any rank.

        Raises:
            CheckpointError: a save failed; the checkpoints before it are untouched. Raised on all ranks.
        """
        started = time.perf_counter()
        is_last = is_interrupted or state.step == self._config.optim.steps
        self._is_owed |= self._is_due(state.step) or is_time
        is_due = is_last or (self._is_owed and is_applied)
        if self._under_way is not None:
            self._advance(self._under_way, must_end_for=state.step if is_due else 0)
        if is_due:
            self._is_owed = False
            self._save(state, in_background=not is_last)
            self._saved_at = time.monotonic()
        self._paused_s += time.perf_counter() - started

    def take_pause(self) -> float:
        """Seconds that training has paused for checkpoints since the last call."""
        paused, self._paused_s = self._paused_s, 0.0
        return paused

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        save, self._under_way = self._under_way, None
        if save is None:
            return
        if isinstance(error, TrainingError):
            try:
                self._end(save)
            except CheckpointError as failure:  # the run's own error is what a user must see last
                logger.error("%s", failure)
            return
        save.abandon()
        logger.warning("the checkpoint of step %d was still being written and is lost", save.step)

    def _is_due(self, step: int) -> bool:
        every = self._config.checkpoint.save_every
        return every > 0 and step % every == 0

    def _advance(self, save: _SaveUnderWay, *, must_end_for: int) -> None:
        """Begin a save's next part when all ranks are ready for it; end it when step `must_end_for` is to be saved."""
        if must_end_for:
            if save.progress == _BUSY:
                logger.warning(
                    "step %d is to be saved, but the checkpoint of step %d is still being written: training waits for "
                    "it (a larger checkpoint.save_every avoids that)",
                    must_end_for,
                    save.step,
                )
            self._end(save)
            return
        slowest = torch.tensor(save.progress, device=self._ranks.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        if int(slowest) == _FAILED:  # on one rank; then no rank needs to continue writing
            save.cancelled.set()
            self._end(save)
        elif int(slowest) == _READY and save.advance():
            self._under_way = None

    def _end(self, save: _SaveUnderWay) -> None:
        self._under_way = None
        while not save.advance():
            pass

    def _save(self, state: RunState, *, in_background: bool) -> None:
        started = time.perf_counter()
        with _without_garbage_collection():
            save = self._planned(state)
        self._known = save.known
        memory = self._memory_for(save) if in_background else None
        if memory is None:
            save.write()
            save.join()
            save.commit()
            logger.info("saved %s in %.1f s", save.finish(), time.perf_counter() - started)
            return
        save.copy_state(memory)
        self._under_way = _SaveUnderWay(save, started=started)

    def _planned(self, state: RunState) -> CheckpointSave:
        make_moments(self._trainer.optimizer)  # of a run whose every step so far was not finite
        return CheckpointSave(
            self._config.runtime.run_dir,
            model_chunks=self._trainer.wrapped,
            optimizer=self._trainer.optimizer,
            run_state=replace(
                state,
                schedule=self._trainer.scheduler.state_dict(),
                expert_bias=self._trainer.expert_bias.table(),
            ),
            ranks=self._ranks,
            hf_folder=self._hf_folder,
            keep=self._config.checkpoint.keep,
            adapters=self._adapters,
            trained=self._trained,
            known=self._known,
        )

    def _memory_for(self, save: CheckpointSave) -> HostCopy | None:
        """Host memory for a copy; None, for good, where there is not enough. Collective, at the first save only."""
        # The size does not say whether it is known: that of a rank without tensors stays 0.
        if self._memory is None or self._is_memory_known:
            return self._memory
        self._is_memory_known = True
        needed = self._memory.block_bytes(save.num_bytes)
        lacking = shortage(needed)
        if lacking:
            logger.warning(
                "checkpoint.async_save is true, but %s; training will wait for every save of this run. Fewer "
                "data.num_workers or a smaller data.prefetch_mib make room; checkpoint.async_save=false silences this",
                lacking,
            )
            self._memory = None
        else:
            logger.info("copies of this rank's state for saves use %.2f GiB of host memory", needed / 2**30)
        return self._memory


class _SaveUnderWay:
    """A save that a thread writes, and then, on rank 0, commits.

    Args:
        save: planned and copied.
        started: `time.perf_counter()` when training stopped for it.
    """

    def __init__(self, save: CheckpointSave, *, started: float) -> None:
        self._save = save
        self._started = started
        self.step = save.run_state.step
        self.cancelled = threading.Event()
        self._is_committing = False
        self._thread = _thread(lambda: save.write(cancelled=self.cancelled))
        self._paused_s = time.perf_counter() - started

    @property
    def progress(self) -> int:
        """Of this rank, in the part that is under way."""
        if self._thread.is_alive():
            return _BUSY
        return _FAILED if self._save.has_failed else _READY

    def advance(self) -> bool:
        """End the part that is under way, waiting for it, and begin the next; True when there is none. Collective."""
        stopped = time.perf_counter()
        self._thread.join()
        if not self._is_committing:
            self._save.join()
            self._is_committing = True
            self._thread = _thread(self._save.commit)
            self._paused_s += time.perf_counter() - stopped
            return False
        folder = self._save.finish()
        end = time.perf_counter()
        took, paused = end - self._started, self._paused_s + end - stopped
        logger.info("saved %s in %.1f s; training paused for %.2f s of them", folder, took, paused)
        return True

    def abandon(self) -> None:
        """Stop writing, without a collective."""
        self.cancelled.set()
        self._thread.join(timeout=_ABANDON_SECONDS)


def _thread(act: Callable[[], None]) -> threading.Thread:
    """Started; a daemon, so that the process can end should a disk hang."""
    thread = threading.Thread(target=act, name="checkpoint", daemon=True)
    thread.start()
    return thread


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A plan is some hundred thousand short-lived objects, which would start a collection over all objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
