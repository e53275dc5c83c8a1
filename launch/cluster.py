"""A cluster file: what is special about one SLURM site, read with nothing but PyYAML.

partition: batch            # the only field that has to be given
ranks_per_node: 8           # processes on a node: its GPUs, or, without GPUs, CPU ranks
container: {runtime: pyxis, image: /images/v2pe.sqsh, mounts: [/data]}
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

RUNTIMES = ("none", "pyxis", "apptainer")
# Between double quotes in the batch script, where a shell expands $NAME, and would run $(...) and `...`.
_LEAST = {"ranks_per_node": 1, "gpus_per_node": 0, "gpu_memory": 1, "cpus_per_node": 0}
_MOUNT = re.compile(r"""(?:[^,"'\\`$\x00-\x1f\x7f]|\$\{?[A-Za-z_][A-Za-z0-9_]*\}?)+""")


class LaunchError(Exception):
    """A mistake in a cluster file, a run file or the command line, with the way out."""


@dataclass(frozen=True)
class Container:
    """How the command reaches its software.

    Attributes:
        runtime: none (what `setup` activates), pyxis (srun --container-image) or apptainer (apptainer exec).
        image: image file or address.
        mounts: folders that are visible inside, under the same path or as outside:inside.
    """

    runtime: str = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """One SLURM site.

    Attributes:
        partition: where jobs go.
        ranks_per_node: processes on a node.
        gpus_per_node: GPUs asked for on each node; 0 for a CPU partition.
        gpu_memory: GB of one GPU, for the check that a run fits.
        gpu: kind of GPU, for the same check: h100, h200 or a100.
        cpus_per_node: cores asked for on each node; 0 asks for none.
        time: time limit where the command line gives none.
        account: account to charge.
        qos: quality of service.
        sbatch: further sbatch options, as written after #SBATCH.
        setup: shell lines before the command: modules, a virtual environment.
        env: variables of the command, beside those that every job sets.
        container: how the command reaches its software.
        project: folder of this repository on the compute nodes; empty is where submit.py lies.
    """

    partition: str
    ranks_per_node: int = 8
    gpus_per_node: int = 8
    gpu_memory: int = 80
    gpu: str = "h100"
    cpus_per_node: int = 0
    time: str = "24:00:00"
    account: str = ""
    qos: str = ""
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    container: Container = field(default_factory=Container)
    project: str = ""


def read_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        LaunchError: no such file, not YAML, unknown key, wrong type, or a missing partition.
    """
    cluster = _build(Cluster, read_yaml(path, examples="launch/clusters/"), where=str(path))
    _check_container(cluster.container, path)
    for name, least in _LEAST.items():
        if (count := getattr(cluster, name)) < least:
            raise LaunchError(f"{path}: {name} is {count}, but must be at least {least}")
    limit_seconds(cluster.time, where=f"{path}: time")
    bad = [name for name in cluster.env if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
    if bad:
        raise LaunchError(f"{path}: env.{bad[0]}: not a name of a variable")
    for name in ("partition", "account", "qos", "time", "sbatch"):
        value = getattr(cluster, name)
        for text in (value,) if isinstance(value, str) else value:
            check_one_line(text, where=f"{path}: {name}")
    return cluster


def read_yaml(path: str | Path, *, examples: str) -> Any:
    """Contents of a YAML file: plain values, no object of a class that a tag names.

    Args:
        path: the file.
        examples: folder of files of this kind, for the message.

    Raises:
        LaunchError: no such file, not UTF-8, not YAML, or nested too deep.
    """
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; examples lie in {examples}") from None
    except UnicodeDecodeError as error:
        raise LaunchError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise LaunchError(f"{path}: not YAML (nested too deep)") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-99-99
        raise LaunchError(f"{path}: not YAML ({error})") from None


def _check_container(container: Container, path: str | Path) -> None:
    if container.runtime not in RUNTIMES:
        raise LaunchError(
            f"{path}: container.runtime is {container.runtime!r}, but must be one of {', '.join(RUNTIMES)}"
        )
    if container.runtime != "none" and not container.image:
        raise LaunchError(f"{path}: container.image is empty, but {container.runtime} needs an image")
    for mount in container.mounts:
        if not _MOUNT.fullmatch(mount):
            raise LaunchError(
                f"{path}: container.mounts: {mount!r} must be a path or outside:inside, with $NAME for variables of "
                "the job, and without commas, quotes, backslashes, backquotes and other uses of $"
            )


def check_one_line(text: str, *, where: str) -> None:
    """Refuse what would leave its #SBATCH line.

    Args:
        text: a value of the batch script's head.
        where: what gave it, for the message.

    Raises:
        LaunchError: it has a line break or another control character.
    """
    if not text.isprintable():
        raise LaunchError(f"{where} is {text!r}, but must be one line without control characters")


def limit_seconds(text: str, *, where: str) -> int:
    """Seconds of a time limit as sbatch takes it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Args:
        text: the limit.
        where: what gave it, for the message.

    Raises:
        LaunchError: it has another form.
    """
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")] if re.fullmatch(r"\d+(:\d+){0,2}", clock) else []
    if not parts or (dash and not days.isdigit()):
        raise LaunchError(
            f"{where} is {text!r}, but must be a time limit such as 24:00:00, 7-00:00:00 or 90 (minutes)"
        )
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [0] * (3 - len(parts)) + parts if len(parts) > 1 else [0, parts[0], 0]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _build(kind: Any, values: Any, *, where: str) -> Any:
    """A dataclass from a mapping; the field's default says its type."""
    if not isinstance(values, dict):
        raise LaunchError(f"{where}: must hold keys and values, found {type(values).__name__}")
    known = {each.name: each for each in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise LaunchError(f"{where}: unknown key {name!r}; {hint}")
    missing = [
        name
        for name, each in known.items()
        if each.default is dataclasses.MISSING
        and each.default_factory is dataclasses.MISSING
        and name not in values
    ]
    if missing:
        raise LaunchError(f"{where}: key {missing[0]!r} is missing; see launch/clusters/ for examples")
    return kind(**{name: _convert(known[name], value, where=where) for name, value in values.items()})


def _variable(value: Any, *, where: str) -> str:
    """The value of a variable: a text or a number. What YAML makes of `yes` or of nothing, no shell would write."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise LaunchError(f"{where} is {value!r}, but must be a text or a number; quote it")


def _convert(known: Any, value: Any, *, where: str) -> Any:
    """A value of the field's type."""
    name, kind = known.name, str(known.type)
    if kind == "Container":
        return _build(Container, value, where=f"{where}: {name}")
    if kind.startswith("tuple") and isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    if kind.startswith("dict") and isinstance(value, dict):
        return {str(key): _variable(each, where=f"{where}: {name}.{key}") for key, each in value.items()}
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    hint = "; quote it" if kind == "str" else ""  # 24:00:00 is a number to YAML
    raise LaunchError(f"{where}: {name} is {value!r}, but must be {kind}{hint}")
