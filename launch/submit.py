#!/usr/bin/env python3
"""Submit a run to SLURM: check it, render a batch script, hand it to sbatch.

    python launch/submit.py CLUSTER.yaml --nodes 4 train RUN.yaml [section.key=value ...]
    python launch/submit.py CLUSTER.yaml --nodes 1 evaluate CHECKPOINT --data eval.jsonl --out eval --cp 8
    python launch/submit.py CLUSTER.yaml --nodes 1 @launch/recipes/evaluate_2b_1m.args
    python launch/submit.py CLUSTER.yaml --nodes 4 --dry-run train RUN.yaml          # prints the script

Needs Python 3.10 and PyYAML on the login node, no torch. A training run is checked by `megatron-v2pe plan` first where
that is installed: one that does not fit its GPUs is refused (--force submits it all the same). Relative paths are
relative to the folder that this is called in.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from launch.cluster import (  # noqa: E402
    Cluster,
    LaunchError,
    check_one_line,
    limit_seconds,
    read_cluster,
    read_yaml,
)

# In the path of a run folder: OmegaConf's interpolation, and what sbatch would read its own way.
_NOT_IN_FOLDERS = ("${", "\\")
VERBS = ("train", "evaluate", "preflight")
# Set where they are known to help, with the reason; a cluster file's env comes after and wins.
GPU_ENV = {
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "1",
        "kernels of one stream queue in order: overlap of tensor parallel communication needs it",
    ),
    "PYTORCH_CUDA_ALLOC_CONF": (
        "expandable_segments:True",
        "packs differ in tiles and documents; fixed segments would fragment",
    ),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (
        "1",
        "a collective that timed out ends the rank instead of hanging it",
    ),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": ("1", "which rank waited for which collective, written when one times out"),
}
CPU_ENV = {
    "OMP_NUM_THREADS": ("1", "ranks share the cores; more threads would wait for each other"),
    "GLOO_SOCKET_IFNAME": (
        "lo",
        "only where all nodes are on one machine; set your interface in the cluster file",
    ),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line; everything from the verb on is handed to megatron-v2pe."""
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )
    parser.add_argument("cluster", help="cluster file (launch/clusters/)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes (default 1)")
    parser.add_argument("--time", default="", help="time limit; default: the cluster file's")
    parser.add_argument("--name", default="", help="job name; default: the run folder's name")
    parser.add_argument(
        "--array", default="", help="sbatch --array, for jobs that continue one another: 1-5%%1"
    )
    parser.add_argument(
        "--warn-seconds", type=int, default=300, help="stop that long before the limit (default 300)"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=3, help="restarts of dead ranks in a job (default 3)"
    )
    parser.add_argument(
        "--max-requeues", type=int, default=100, help="times that the job queues itself again"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script, check the run, submit nothing"
    )
    parser.add_argument(
        "--force", action="store_true", help="submit although plan says that the run does not fit"
    )
    parser.add_argument("verb", choices=VERBS, help="verb of megatron-v2pe")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    for name, least in {"nodes": 1, "warn_seconds": 1, "max_restarts": 0, "max_requeues": 0}.items():
        if (value := getattr(options, name)) < least:
            raise LaunchError(f"--{name.replace('_', '-')} is {value}, but must be at least {least}")
    return options


def check_time(cluster: Cluster, options: argparse.Namespace) -> None:
    """Refuse a job whose warning would come before its first step, again and again.

    Raises:
        LaunchError: the warning is as early as the job is long, or the limit is none.
    """
    limit = options.time or cluster.time
    if limit_seconds(limit, where="--time") <= options.warn_seconds:
        raise LaunchError(
            f"--warn-seconds is {options.warn_seconds}, but the time limit is {limit}: the job would be asked to stop "
            "when it starts; give it more --time, or a later warning"
        )


def run_folder(verb: str, arguments: list[str]) -> str:
    """Folder that the job writes to: runtime.run_dir of the run file or its override, or --out.

    Raises:
        LaunchError: there is none, or the run file cannot be read.
    """
    if verb == "evaluate":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--out", default="")
        folder = parser.parse_known_args(arguments)[0].out
        if not folder:
            raise LaunchError("evaluate: give --out, the folder of its results")
        return _checked_folder(folder, where="--out", hint="")
    if not arguments:
        raise LaunchError(f"{verb}: give the run's YAML file")
    given = [text.partition("=")[2] for text in arguments[1:] if text.startswith("runtime.run_dir=")]
    if given:
        return _checked_folder(given[-1], where="runtime.run_dir", hint="", is_yaml=True)
    values = read_yaml(arguments[0], examples="launch/recipes/")
    runtime = values.get("runtime") if isinstance(values, dict) else None
    folder = runtime.get("run_dir") if isinstance(runtime, dict) else None
    if folder is None:
        raise LaunchError(f"{arguments[0]}: runtime.run_dir is not given; add it, or runtime.run_dir=...")
    return _checked_folder(
        folder, where=f"{arguments[0]}: runtime.run_dir", hint="; give runtime.run_dir=..."
    )


def _checked_folder(value: Any, *, where: str, hint: str, is_yaml: bool = False) -> str:
    """A run folder that means the same here, in the batch script and to `train`.

    Args:
        value: as it was given.
        where: for messages.
        hint: a way out, for messages.
        is_yaml: `train` reads it as YAML, which removes quotes and comments.

    Raises:
        LaunchError: it is empty or no text, or means something else to YAML, OmegaConf or sbatch.
    """
    is_text = isinstance(value, (str, int, float, datetime.date)) and not isinstance(value, bool)
    folder = str(value) if is_text else ""
    odd = next((sign for sign in _NOT_IN_FOLDERS if sign in folder), "")
    is_plain = folder and folder == folder.strip() and not folder.startswith("-")
    if odd or not is_plain or (is_yaml and _yaml_text(folder) != folder):
        rule = f"without {odd}" if odd else "without a dash, quotes or blanks around it"
        raise LaunchError(f"{where} is {value!r}, but the run folder must be a path as it is, {rule}{hint}")
    return os.path.expanduser(folder) if folder.startswith("~/") else folder


def _yaml_text(text: str) -> str:
    try:
        return str(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""


def render(cluster: Cluster, options: argparse.Namespace, *, run_dir: str) -> str:
    """The batch script as text."""
    project = cluster.project or str(HERE.parent)
    values = {
        "SBATCH": "\n".join(f"#SBATCH {line}" for line in _directives(cluster, options, run_dir)),
        "RUN_DIR": shlex.quote(run_dir),
        "PROJECT": shlex.quote(project),
        "MAX_REQUEUES": str(options.max_requeues),
        "MAX_RESTARTS": str(options.max_restarts),
        "RANKS_PER_NODE": str(cluster.ranks_per_node),
        "SETUP": "\n".join(cluster.setup) or "# (the cluster file has no setup)",
        "ENV": _environment(cluster),
        "SRUN": _srun(cluster, [options.verb, *options.arguments]),
    }
    if cluster.container.runtime != "none":
        _check_mounts({"the run folder": run_dir, "project": project, "the current folder": os.getcwd()})
    text = (HERE / "job.sbatch").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], text)


def _check_mounts(folders: Mapping[str, str]) -> None:
    """Refuse a folder whose name a list of mounts would read as two."""
    for what, folder in folders.items():
        if set(",:") & set(folder):
            raise LaunchError(
                f"{what} is {folder!r}, but is mounted into the container, and names in a list of mounts have neither "
                "comma nor colon; choose another"
            )


# Where a line of the script's head comes from, for messages.
_ORIGIN = {"job-name": "the job's name (--name, else the run folder's)", "output": "the run folder"}


def _directives(cluster: Cluster, options: argparse.Namespace, run_dir: str) -> list[str]:
    asked = {
        "job-name": options.name or Path(run_dir).name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "nodes": str(options.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(cluster.gpus_per_node or ""),
        "cpus-per-task": str(cluster.cpus_per_node or ""),
        "time": options.time or cluster.time,
        "array": options.array,
        "signal": f"B:USR1@{options.warn_seconds}",
        "open-mode": "append",
        "output": f"{run_dir.replace('%', '%%')}/slurm-%j.log",
    }
    for name, value in asked.items():
        check_one_line(value, where=_ORIGIN.get(name, f"--{name}"))
    lines = [f"--{name}={shlex.quote(value)}" for name, value in asked.items() if value]
    return [*lines, "--requeue", *cluster.sbatch]


def _environment(cluster: Cluster) -> str:
    own = GPU_ENV if cluster.gpus_per_node else CPU_ENV
    lines = [
        f"export {name}={value} # {why}" for name, (value, why) in own.items() if name not in cluster.env
    ]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()]
    if cluster.container.runtime == "apptainer":
        names = " ".join(_variables(cluster))
        lines += [
            "# What an image sets itself would win over these otherwise.",
            f'for name in {names}; do export "APPTAINERENV_$name=${{!name}}"; done',
        ]
    return "\n".join(lines)


def _variables(cluster: Cluster) -> list[str]:
    """Names of the variables that a job sets for its command."""
    return list(dict.fromkeys([*(GPU_ENV if cluster.gpus_per_node else CPU_ENV), *cluster.env]))


def _srun(cluster: Cluster, command: list[str]) -> str:
    """srun of the node entry, in its container."""
    container = cluster.container
    step, inside = "srun --kill-on-bad-exit=1 --wait=60", ""
    # The run folder always: a container would keep to itself, and lose, what is written where nothing is mounted.
    mounts = '"' + ",".join(["$project", "$PWD", "$run_dir", *container.mounts]) + '"'
    if container.runtime == "pyxis":
        image, names = shlex.quote(container.image), ",".join(_variables(cluster))
        step += f' --container-image={image} --container-mounts={mounts} --container-workdir="$PWD"'
        # What an image sets itself wins over the job's variables, but for those that are named here.
        step += f" \\\n    --container-env={names}"
    if container.runtime == "apptainer":
        nv = "--nv " if cluster.gpus_per_node else ""
        inside = f'apptainer exec {nv}--bind {mounts} --pwd "$PWD" {shlex.quote(container.image)} '
    return f'{step} \\\n    {inside}bash "$project/launch/node_entry.sh" {shlex.join(command)}'


def check_fit(cluster: Cluster, options: argparse.Namespace) -> None:
    """Ask `megatron-v2pe plan` whether a training run fits; say so where it cannot be asked.

    Raises:
        LaunchError: it does not fit and --force is not given, or its configuration is refused.
    """
    if options.verb != "train" or not cluster.gpus_per_node:
        return
    if importlib.util.find_spec("omegaconf") is None:
        _say("megatron-v2pe is not installed for this Python: whether the run fits its GPUs is not checked")
        return
    gpus = options.nodes * cluster.ranks_per_node
    command = [sys.executable, "-m", "megatron_v2pe", "plan", *options.arguments]
    # Called where the user is, as the run file may lie there; found also where it is not installed.
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    around = {**os.environ, "PYTHONPATH": path}
    command += ["--gpus", str(gpus), "--gpu", cluster.gpu, "--gpu-memory", str(cluster.gpu_memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    if done.returncode == 0:
        return
    output = (done.stdout + done.stderr).strip()
    if options.force:
        _say(f"submitting although plan says:\n{output}")
        return
    raise LaunchError(f"plan refuses the run on {gpus} GPUs (--force submits it all the same):\n{output}")


def _say(text: str) -> None:
    sys.stderr.write(f"[submit] {text}\n")


def submit(script: str, run_dir: str) -> str:
    """Keep the script in the run folder and hand it to sbatch; returns what sbatch says.

    Raises:
        LaunchError: the folder cannot be written, or sbatch is missing or refuses.
    """
    folder = Path(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"job.sbatch.{os.getpid()}"
        aside.touch(mode=0o600)  # it holds the values of `env`, such as keys of trackers and stores
        aside.chmod(0o600)
        aside.write_text(script, encoding="utf-8")
        aside.replace(folder / "job.sbatch")
    except OSError as error:
        raise LaunchError(
            f"{run_dir}: cannot be written ({error.strerror}); choose another run folder"
        ) from None
    try:
        done = subprocess.run(
            ["sbatch", str((folder / "job.sbatch").absolute())], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            "sbatch is not on the PATH; submit from a login node, or look with --dry-run"
        ) from None
    if done.returncode:
        raise LaunchError(f"sbatch refused the job: {done.stderr.strip()}")
    return done.stdout.strip()


def check_folder(run_dir: str) -> None:
    """Whether the run folder could be made and written, without making it: what a dry run says of it.

    Raises:
        LaunchError: as `submit` would.
    """
    place = Path(run_dir).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    reason = (
        "Not a directory" if not place.is_dir() else "" if os.access(place, os.W_OK) else "Permission denied"
    )
    if reason:
        raise LaunchError(f"{run_dir}: cannot be written ({reason}); choose another run folder")


def tell_holder(run_dir: str) -> None:
    """Say that another job has the run folder now; the new one is let in if that has left when it starts."""
    lock = Path(run_dir) / "job.lock"
    if lock.is_file():
        holder = lock.read_text(encoding="utf-8", errors="replace").strip()
        _say(
            f"{run_dir} is in use: {holder}; the new job is refused if that one is still there when it starts"
        )


def main(arguments: list[str] | None = None) -> int:
    """Exit code 2 for a mistake of the user's."""
    try:
        options: Any = parse(sys.argv[1:] if arguments is None else arguments)
        cluster = read_cluster(options.cluster)
        run_dir = run_folder(options.verb, options.arguments)
        check_time(cluster, options)
        script = render(cluster, options, run_dir=run_dir)
        if options.dry_run:
            sys.stdout.write(script)
        check_fit(cluster, options)
        if options.dry_run:
            if not options.force:
                check_folder(run_dir)
            return 0
        sys.stdout.write(submit(script, run_dir) + "\n")
        tell_holder(run_dir)
        return 0
    except LaunchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
