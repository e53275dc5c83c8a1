"""Which data with which checkpoint, for verbs that read a run's data without training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_v2pe.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_v2pe.config.schema import RunConfig


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's file with overrides, or a meta json and a checkpoint."""
    parser.add_argument("run", nargs="*", metavar="RUN.yaml", help="run, then section.key=value ...")
    parser.add_argument("--meta", help="meta json, instead of a run's file")
    parser.add_argument(
        "--checkpoint", help="checkpoint or Hugging Face folder: its tokenizer and tile size count"
    )
    parser.add_argument("--cache-dir", help="short for data.cache_dir=...: where lengths are kept")


def data_config(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments describe.

    Raises:
        ConfigError: no data or no checkpoint is named, or a field is wrong.
    """
    from megatron_v2pe.config.load import load_run_config

    words = list(args.run)
    path = words.pop(0) if words and "=" not in words[0] else None
    fields = {"data.meta": args.meta, "data.cache_dir": args.cache_dir, "model.checkpoint": args.checkpoint}
    given = [f"{name}={json.dumps(value)}" for name, value in fields.items() if value is not None]
    if args.checkpoint is not None:
        given.append("model.hf_path=''")
    config = load_run_config(path, [*words, *given])
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
