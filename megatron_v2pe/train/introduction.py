"""What a run says of itself before its first step, and whether its first checkpoint has room.

training run                                              before the model is built
  version  megatron_v2pe 0.1.0, torch 2.13.0, cpu
  ...
  saves    every 30 minutes (checkpoint.save_minutes) and at the end
data: 24 samples of 1 data set, 11 packs an epoch; 10 packs are 0.91 epochs        once they were measured
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import megatron_v2pe
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.batch_schedule import batch_schedule
from megatron_v2pe.config.lora import parts_trained_whole
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.text_table import text_table
from megatron_v2pe.data.loader import TrainLoader
from megatron_v2pe.parallel.plan import ParallelPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunSizes:
    """Sizes that follow from configuration and architecture.

    Attributes:
        parameters: of the whole model, adapters included.
        trained: of those, how many are trained.
        checkpoint_bytes: of one checkpoint of the run.
    """

    parameters: int
    trained: int
    checkpoint_bytes: int


SizesOf = Callable[[RunConfig, InternVLArchitecture], RunSizes]


def introduction(
    config: RunConfig,
    *,
    plan: ParallelPlan,
    architecture: str,
    template: str,
    sizes: RunSizes,
    resume_from: Path | None,
) -> str:
    """What is trained, on what, for how long, and where to look.

    Args:
        config: the run.
        plan: its layout.
        architecture: of the language model.
        template: of the checkpoint's config.json.
        sizes: of the model and a checkpoint.
        resume_from: checkpoint of the run that is continued.
    """
    runtime = config.runtime
    trained = [*parts_trained_whole(config), *(["adapters"] if config.lora.is_on else [])]
    begin = f"continued from {resume_from.name}" if resume_from else "from the first"
    sharding = config.parallel.cp_sharding
    cp = f"cp {plan.cp}" if sharding == "zigzag" else f"cp {plan.cp} ({sharding})"
    layout = f"tp {plan.tp}, {cp}, pp {plan.pp}, dp {plan.dp}; {runtime.dtype}"
    ranks = "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"
    share = f"{sizes.trained / 1e6:,.1f} M parameters, {sizes.trained / sizes.parameters:.1%} of the model"
    rows = [
        ["version", f"megatron_v2pe {megatron_v2pe.__version__}, torch {torch.__version__}, {_device()}"],
        ["model", f"{config.model.hf_path or config.model.checkpoint}"],
        ["", f"{architecture}, {sizes.parameters / 1e6:,.1f} M parameters"],
        ["trained", f"{', '.join(trained)}: {share}"],
        ["layout", f"{ranks}: {layout}"],
        ["data", f"{config.data.meta}; packs of {config.data.max_pack_tokens:,} tokens"],
        ["", _template(config.data.template, template)],
        ["steps", f"{config.optim.steps} of {batch_schedule(config).text}; {begin}"],
        ["saves", _saves(config, sizes, first_step=_step_of(resume_from))],
        ["folder", f"{runtime.run_dir}; `megatron-v2pe runs {runtime.run_dir}` shows the run"],
    ]
    return "\n".join(["training run", *text_table(None, rows, align="<", indent="  ")])


def _template(of_run: str, of_checkpoint: str) -> str:
    if of_run in ("", of_checkpoint) or not of_checkpoint:
        return f"template {of_run or of_checkpoint}"
    return f"template {of_run}, where the checkpoint's config.json says {of_checkpoint}: the run teaches another one"


def describe_data(config: RunConfig, loader: TrainLoader) -> str:
    """Samples, packs of the first epoch, and how many epochs the steps are."""
    packs = batch_schedule(config).packs_before(config.optim.steps)
    sets = len(loader.source_names)
    an_epoch = loader.packs_of_first_epoch
    return (
        f"data: {loader.num_samples:,} samples of {sets} data set{'s' if sets > 1 else ''}, {an_epoch:,} packs an "
        f"epoch; {packs:,} packs are {packs / max(1, an_epoch):.2f} epochs"
    )


def check_room(config: RunConfig, run_dir: Path, sizes: RunSizes) -> None:
    """The first checkpoint has room, before hours are spent on its contents.

    Raises:
        ConfigError: it has not; not final, as there may be room at the launcher's next start.
    """
    free, one, keep = shutil.disk_usage(run_dir).free, sizes.checkpoint_bytes, config.checkpoint.keep
    if free < one:
        error = ConfigError(
            f"runtime.run_dir is {str(run_dir)!r}, whose disk has {free / 1e9:.3g} GB free, but one checkpoint of this "
            f"run has about {one / 1e9:.3g} GB; make room, or give a folder on another disk"
        )
        error.is_final = False
        raise error
    needed = one * min(_most_saves(config), keep + 1)
    if free < needed:
        logger.warning(
            "%s: %.3g GB are free, but checkpoints may need %.3g GB (checkpoint.keep = %d and the one that is being "
            "written); make room, or lower checkpoint.keep",
            run_dir,
            free / 1e9,
            needed / 1e9,
            keep,
        )


def _most_saves(config: RunConfig) -> int:
    every, steps = config.checkpoint.save_every, config.optim.steps
    if every:
        return max(1, steps // every)
    return steps if config.checkpoint.save_minutes else 1


def _saves(config: RunConfig, sizes: RunSizes, *, first_step: int) -> str:
    every, last = config.checkpoint.save_every, config.optim.steps
    size = f"about {sizes.checkpoint_bytes / 1e9:.3g} GB each"
    minutes, kept = config.checkpoint.save_minutes, f"the newest {config.checkpoint.keep} are kept, {size}"
    if not every and minutes:
        return f"every {minutes:g} minutes (checkpoint.save_minutes) and at the end; {kept}"
    following = (first_step // every + 1) * every if every else last
    if following >= last:
        return f"at the end only: no checkpoint before step {last} (checkpoint.save_every = {every}); {size}"
    return f"every {every} steps, the next after step {following}; {kept}"


def _step_of(folder: Path | None) -> int:
    return int(folder.name.rpartition("_")[2]) if folder is not None else 0


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
