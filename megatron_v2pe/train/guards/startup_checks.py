"""What is checked before a run starts, while no rank waits for another: its model, and the run it continues."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_v2pe.checkpoint.convert.hf_source import open_hf
from megatron_v2pe.checkpoint.files.adapter_record import (
    describe_adapters,
    require_same_adapters,
    require_whole,
)
from megatron_v2pe.checkpoint.files.folder import hf_path, read_info, state_path
from megatron_v2pe.checkpoint.model_facts import model_facts, require_same_model
from megatron_v2pe.checkpoint.resume import resume_point
from megatron_v2pe.checkpoint.run_state import RunState
from megatron_v2pe.checkpoint.state.reader import StateReader
from megatron_v2pe.config.arch.architecture import InternVLArchitecture
from megatron_v2pe.config.schema import RunConfig
from megatron_v2pe.core.errors import ConfigError

LARGE_GATES = re.compile(r"interaction_units_12\.branch2to1_injector\.c(a|ffn)_gamma$")
READOUT_BIASES = re.compile(r"^(mm_projector|projector\.merge)\..*\.bias$")


def hf_folder_of(config: RunConfig) -> Path:
    """Where config.json and the tokenizer of the run's model are."""
    return Path(config.model.hf_path) if config.model.hf_path else hf_path(config.model.checkpoint)


def model_folder(config: RunConfig) -> Path:
    """`hf_folder_of` a model that was checked as far as that needs no reading of weights.

    Raises:
        CheckpointError: the checkpoint or Hugging Face folder is not whole.
    """
    if config.model.hf_path:
        open_hf(config.model.hf_path)
    else:
        read_info(config.model.checkpoint)
        require_whole(config.model.checkpoint)
    return hf_folder_of(config)


def require_learning_pyramid(config: RunConfig, arch: InternVLArchitecture) -> None:
    """Refuse a pyramid that can never learn to be read: what its readout goes through is as it was made, and frozen.

    With the readout `large` that are the gates into the large branch, all zero, through which alone a pyramid reaches
    the language model. With `llava` it is the readout itself, whose random weights give noise.

    Raises:
        ConfigError: names the field that freezes it.
    """
    if arch.pyramid is None:
        return
    source = config.model.hf_path or config.model.checkpoint
    if arch.reads_all_branches:
        # Biases are zero at first, and not after an update.
        if config.model.freeze_projector and not _any_number(config, READOUT_BIASES):
            raise ConfigError(
                f"model.freeze_projector is true, but the pyramid's readout (llava) in {source} is as add-piip made "
                "it: random, so that the language model would get noise that never becomes anything else; set "
                "model.freeze_projector to false, or give a checkpoint whose readout was trained"
            )
        return
    if config.vision.freeze and not _any_number(config, LARGE_GATES):
        raise ConfigError(
            f"vision.freeze is true, but all gates of the pyramid are zero in {source}: it would be computed, change "
            "nothing and never learn; set vision.freeze to false (vision.freeze_large_branch with vision.tower piip "
            "keeps the checkpoint's own tower as it is), or give the checkpoint without the pyramid"
        )


def _any_number(config: RunConfig, pattern: re.Pattern[str]) -> bool:
    """Whether some tensor of the run's model whose name matches is not zero everywhere."""
    if config.model.hf_path:
        weights, _, _ = open_hf(config.model.hf_path)
        names, read = weights.tensors, weights.read
    else:
        state = StateReader(state_path(config.model.checkpoint))
        names, read = state.tensors, state.read  # type: ignore[assignment]
    return any(bool(read(name).any()) for name in names if pattern.search(name))


def require_usable_folder(run_dir: Path) -> None:
    """What a run writes can be written: no folder has the name of a file, no file that of a folder.

    Raises:
        ConfigError: names it.
    """
    files = (
        "run.lock",
        "metrics.jsonl",
        "config.yaml",
        "starts.jsonl",
        "checkpoints/latest",
        "start_up.json",
    )
    folders = ("checkpoints", "heartbeats", "stacks")
    wrong = [run_dir / name for name in files if (run_dir / name).is_dir()]
    wrong += [run_dir / name for name in folders if (run_dir / name).is_file()]
    if wrong:
        kinds = ("folder", "file") if wrong[0].is_dir() else ("file", "folder")
        raise ConfigError(
            f"runtime.run_dir is {str(run_dir)!r}, in which {wrong[0]} is a {kinds[0]}, but a run writes a {kinds[1]} "
            "of that name; rename it, or give another folder"
        )


def run_to_continue(config: RunConfig, run_dir: Path) -> Path | None:
    """Checkpoint of the run folder to continue from, of the same model and adapters; None for a new run.

    Raises:
        ConfigError: there is one, but `checkpoint.resume` is false.
        CheckpointError: the newest one is damaged, or of another model.
    """
    newest = resume_point(run_dir, fallback=config.checkpoint.fallback)
    if newest is None:
        return None
    if not config.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume is false, but {newest} exists; set it to true to continue that run, or give this "
            "one its own runtime.run_dir"
        )
    require_same_adapters(describe_adapters(config), newest)
    require_same_model(config, newest)
    return newest


def initial_state(config: RunConfig) -> RunState:
    """State of a run that has done nothing yet; its facts say later what it was configured for."""
    return RunState(
        step=0,
        consumed_packs=0,
        data_seed=config.runtime.seed,
        data_hash="",  # the loader's, once it has measured the data
        position_mode=config.position.mode,
        position_stride=config.position.stride,
        model_facts=model_facts(config),
    )
