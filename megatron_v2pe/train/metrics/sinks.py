"""Where a step's numbers go, besides the log: one small protocol, three places. Rank 0 alone has sinks.

{name: number} --> metrics.jsonl (always) | tensorboard/ (runtime.tensorboard) | W&B (runtime.wandb_project)
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_v2pe.config.schema import RuntimeConfig
from megatron_v2pe.core.errors import ConfigError, DataError
from megatron_v2pe.core.files import write_atomic
from megatron_v2pe.core.jsonl import append_json, read_jsonl

METRICS_FILE = "metrics.jsonl"
REPLACED_FILE = "metrics_replaced.jsonl"  # of steps that no checkpoint held, and that were done again
Values = Mapping[str, Any]


class Sink(Protocol):
    """Writes the numbers of one step after the other."""

    def write(self, values: Values) -> None:
        """Write a step's values; `step` is among them, and None is a number that is not finite."""

    def close(self) -> None:
        """Flush."""


class JsonLines:
    """metrics.jsonl. Of a resumed run, lines from `first_step` on move to another file: those steps come again."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        self._path = run_dir / METRICS_FILE
        if self._path.exists():
            lines = list(read_jsonl(self._path, skip_cut=True))
            for number, line in lines:
                if type(line.get("step")) is not int:
                    raise DataError(
                        f"{self._path}:{number}: step is {line.get('step')!r}, but must be a number; repair the line, "
                        "or rename the file"
                    )
            kept = [line for _, line in lines if line["step"] < first_step]
            for _, line in lines:
                if line["step"] >= first_step:
                    append_json(run_dir / REPLACED_FILE, line)
            write_atomic(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, values: Values) -> None:
        """Append a line."""
        append_json(self._path, values)

    def close(self) -> None:
        """Every line is on its way already."""


class TensorBoard:
    """<run_dir>/tensorboard, one curve for each number."""

    def __init__(self, run_dir: Path, *, first_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def write(self, values: Values) -> None:
        """Add a point to each curve, all in one event: a tenth of the time of one event each."""
        points = [
            self._summary.Value(tag=f"train/{name}", simple_value=value)
            for name, value in _numbers(values).items()
        ]
        self._writer.file_writer.add_summary(self._summary(value=points), values["step"])

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run that is named after the run folder, and continued when the run is."""

    def __init__(self, run_dir: Path, *, project: str) -> None:
        wandb = importlib.import_module("wandb")
        name = run_dir.resolve().name
        self._run: Any = wandb.init(project=project, id=name, name=name, dir=str(run_dir), resume="allow")

    def write(self, values: Values) -> None:
        """Send the numbers."""
        self._run.log(
            {f"train/{name}": value for name, value in _numbers(values).items()}, step=values["step"]
        )

    def close(self) -> None:
        """Wait for the upload."""
        self._run.finish()


def check_sinks(runtime: RuntimeConfig) -> None:
    """What the configuration asks for is installed.

    Raises:
        ConfigError: W&B is wanted but not installed.
    """
    if runtime.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"runtime.wandb_project is {runtime.wandb_project!r}, but the package wandb is not installed; install it "
            "(pip install 'megatron-v2pe[track]'), or leave the field empty: metrics.jsonl has the same numbers"
        )


def open_sinks(runtime: RuntimeConfig, run_dir: Path, *, rank: int, first_step: int) -> list[Sink]:
    """The sinks of a rank; none but on rank 0."""
    if rank != 0:
        return []
    sinks: list[Sink] = [JsonLines(run_dir, first_step=first_step)]
    if runtime.tensorboard:
        sinks.append(TensorBoard(run_dir, first_step=first_step))
    if runtime.wandb_project:
        sinks.append(WeightsAndBiases(run_dir, project=runtime.wandb_project))
    return sinks


def _numbers(values: Values) -> dict[str, float]:
    """Without the step, texts, and what is not finite; a mapping as one number for each of its names.

    Example: {"loss": 2.0, "loss_by_source": {"books": 1.5}} is {"loss": 2.0, "loss/books": 1.5}.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{name.removesuffix('_by_source')}/{inner}": each for inner, each in value.items()}
        elif name != "step":
            flat[name] = value
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}
