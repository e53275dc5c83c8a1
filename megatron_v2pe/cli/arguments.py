"""Arguments that several verbs share, and what each of them means."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_v2pe.core.env import Launcher, launcher
from megatron_v2pe.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress
    from megatron_v2pe.config.schema import ParallelConfig, RunConfig

_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


# A run's configuration


def add_run_config(parser: argparse.ArgumentParser) -> None:
    """Add RUN.yaml and the overrides, for verbs that need a whole run."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="fields that replace the file's"
    )


def run_config(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration; where model.checkpoint is the folder of a run, its newest checkpoint is meant.

    Raises:
        ConfigError: see `load_run_config`.
        CheckpointError: a run without any checkpoint.
    """
    import dataclasses

    from megatron_v2pe.checkpoint.retention import checkpoint_of
    from megatron_v2pe.config.load import load_run_config

    config = load_run_config(path, overrides)
    if not config.model.checkpoint:
        return config
    checkpoint = str(checkpoint_of(config.model.checkpoint))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, checkpoint=checkpoint))


# The data of a run, without the run


def add_data_source(parser: argparse.ArgumentParser) -> None:
    """Add a run's file with overrides, or a meta json and a checkpoint."""
    parser.add_argument("run", nargs="*", metavar="RUN.yaml", help="run, then section.key=value ...")
    parser.add_argument("--meta", help="meta json, instead of a run's file")
    parser.add_argument(
        "--checkpoint", help="checkpoint or Hugging Face folder: its tokenizer and tile size count"
    )
    parser.add_argument("--cache-dir", help="short for data.cache_dir=...: where lengths are kept")


def data_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments of `add_data_source` describe.

    Raises:
        ConfigError: no data or no checkpoint is named, or a field is wrong.
    """
    overrides = list(args.run)
    path = overrides.pop(0) if overrides and "=" not in overrides[0] else None
    fields = {"data.meta": args.meta, "data.cache_dir": args.cache_dir, "model.checkpoint": args.checkpoint}
    given = [f"{name}={json.dumps(value)}" for name, value in fields.items() if value is not None]
    if args.checkpoint is not None:
        given.append("model.hf_path=''")
    config = run_config(path, [*overrides, *given])
    if not config.data.meta:
        raise ConfigError("no data is named: give RUN.yaml with data.meta, or --meta META.json")
    if not (config.model.checkpoint or config.model.hf_path):
        raise ConfigError("no checkpoint is named, whose tokenizer counts tokens; give --checkpoint FOLDER")
    if not (config.data.cache_dir or config.runtime.run_dir):
        raise ConfigError(
            "no place to keep what is measured: give --cache-dir FOLDER, as data.cache_dir of the run"
        )
    return config


def tokenizer_folder(config: RunConfig) -> Path:
    """Hugging Face folder of the checkpoint that the configuration names."""
    from megatron_v2pe.checkpoint.files.folder import hf_path, is_complete

    folder = config.model.hf_path or config.model.checkpoint
    return hf_path(folder) if is_complete(folder) else Path(folder)


# Parallel sizes, for verbs that run a model without a run's YAML file


def add_parallel_sizes(parser: argparse.ArgumentParser) -> None:
    """Add `--tp`, `--pp` and `--cp`; 1 each by default."""
    for name, axis in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context")):
        parser.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{axis} parallel size (default 1)"
        )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The sizes of `add_parallel_sizes` as configuration.

    Raises:
        ConfigError: a size is below 1.
    """
    from megatron_v2pe.config.schema import ParallelConfig

    for name in ("tp", "pp", "cp"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    return ParallelConfig(tp=args.tp, pp=args.pp, cp=args.cp)


# Checkpoints


def add_format(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--format`, for verbs that write a Hugging Face folder.

    Args:
        parser: of the verb.
        default: what is written without the option, in words.
    """
    parser.add_argument(
        "--format",
        choices=("github", "hf-native"),
        default="",
        help="github (InternVLChatModel, names as released on GitHub) or hf-native (transformers' own "
        f"InternVLForConditionalGeneration, the -hf folders); default: {default}",
    )


def add_cast(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for verbs that write weights."""
    parser.add_argument(
        "--dtype",
        choices=("keep", "bfloat16", "float16", "float32"),
        default="keep",
        help="cast floating point tensors, and torch_dtype of config.json; default: every tensor keeps its own",
    )


def add_verify_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add `--verify-checkpoint`, for verbs that read a checkpoint."""
    parser.add_argument(
        "--verify-checkpoint",
        choices=("sizes", "full"),
        default="sizes",
        help="check the checkpoint's files first: their sizes (default), or the hashes of all of them, which also "
        "finds flipped bits and reads every byte once more",
    )


def check_files(args: argparse.Namespace) -> Launcher:
    """Check the files of `args.checkpoint` as `--verify-checkpoint` says; under torchrun each process hashes a share.

    A run folder becomes its newest checkpoint.

    Returns:
        What the launcher says about this process.

    Raises:
        CheckpointError: names the damaged files that this process found.
    """
    from megatron_v2pe.checkpoint.model_source import require_source
    from megatron_v2pe.checkpoint.retention import checkpoint_of

    here = launcher()
    args.checkpoint = str(checkpoint_of(args.checkpoint))
    require_source(args.checkpoint, verify=args.verify_checkpoint, rank=here.rank, world_size=here.world_size)
    return here


def parse_size(text: str) -> int:
    """Bytes of "5GB" or "500MiB".

    Raises:
        ConfigError: anything else.
    """
    unit = text.lstrip("0123456789")
    digits = text.removesuffix(unit)
    if unit not in _SIZE_UNITS or not digits or int(digits) == 0:
        raise ConfigError(
            f"--max-shard-size is {text!r}, must be a whole number and one of {', '.join(_SIZE_UNITS)}"
        )
    return int(digits) * _SIZE_UNITS[unit]


# Processes and progress


def require_one_process(verb: str) -> None:
    """Raise ConfigError where torchrun started several processes, which would all do the same."""
    num_processes = launcher().world_size
    if num_processes > 1:
        raise ConfigError(
            f"{verb} runs in one process, {num_processes} were started; start it without torchrun"
        )


@contextmanager
def byte_progress(verb: str) -> Iterator[ByteProgress]:
    """Count bytes for a verb that runs in one process.

    Raises:
        ConfigError: torchrun started several.
    """
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress

    require_one_process(verb)
    progress = ByteProgress(verb)
    try:
        yield progress
    finally:
        progress.close()


@contextmanager
def shared_progress(verb: str) -> Iterator[ByteProgress]:
    """Join the other ranks where torchrun started several, and count this one's bytes."""
    from megatron_v2pe.checkpoint.files.byte_progress import ByteProgress
    from megatron_v2pe.checkpoint.state.ranks import launched_ranks

    with launched_ranks():
        progress = ByteProgress(verb, rank=launcher().rank)
        try:
            yield progress
        finally:
            progress.close()
