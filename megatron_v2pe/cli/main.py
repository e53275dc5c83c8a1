"""From `megatron-v2pe VERB ...` to one module, and from exceptions to exit codes.

    V2PEError      a mistake the user can mend: one message on stderr, exit code 2; torchrun's restarts end at once
    anything else  a mistake of ours: traceback, exit code 1

Only the module of the chosen verb is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from types import ModuleType

from megatron_v2pe import __version__
from megatron_v2pe.core.env import is_under_torchrun, launcher, require_known_starter
from megatron_v2pe.core.errors import V2PEError
from megatron_v2pe.core.excerpt import shortened
from megatron_v2pe.core.logging import quiet_dependencies, setup_logging
from megatron_v2pe.core.processes import end_without_launcher
from megatron_v2pe.core.refusal import refuse, report_to_torchrun, was_refused

ROOMS = {  # sub-room of cli -> its title in the overview, and its verbs
    "data": (
        "data",
        {
            "convert-data": "one record a line from json, gzip and parquet files, or a look through them",
            "index-data": "measure a run's data once, and show what it holds",
            "show-sample": "one packed sample as a picture and a list: text, images, labels, positions, ranks",
            "synthesize": "long-context training and evaluation data from texts and images",
        },
    ),
    "conversion": (
        "checkpoints and their numbers",
        {
            "import-hf": "Hugging Face InternVL2 folder -> checkpoint for training",
            "export-hf": "checkpoint -> Hugging Face InternVL2 folder",
            "convert-hf": "Hugging Face folder of GitHub's format -> native (-hf) folder, or back",
            "add-piip": "Hugging Face folder -> the same with a pyramid of smaller networks around its vision tower",
            "verify": "compare a Hugging Face folder with a checkpoint, bit for bit",
            "verify-numerics": "compare what a checkpoint computes with plain PyTorch, stage by stage",
            "check-golden": "run recorded cases of the V2PE release",
        },
    ),
    "runs": (
        "training runs and machines",
        {
            "train": "fine-tune from a run's YAML file; also under torchrun",
            "runs": "what happened in a run, with curves; two runs side by side",
            "plan": "memory, time and best layouts of a run, worked out without a cluster",
            "recipes": "run files and cluster files that come with the package, and where submit.py is",
            "prove": "this run's parallel layout against one rank, with a certificate",
            "preflight": "go or no-go: what would stop a run on these machines, found in a minute",
            "doctor": "what this machine has and what will therefore be used",
        },
    ),
    "inference": (
        "answers",
        {
            "generate": "answer a question about images and videos",
            "chat": "a conversation about images and videos in the terminal",
            "serve": "an OpenAI-compatible server",
        },
    ),
    "evaluation": (
        "scores",
        {
            "evaluate": "published benchmarks, or retrieval over lengths, by stride, with a report",
            "lmms": "lmms-eval's tasks with this model, as a second judge",
            "score": "score a benchmark's answers again, without a model",
            "paper-table": "the paper's and the model card's numbers beside ours",
            "check-data": "what of the published benchmarks is here, and what to download",
        },
    ),
}
VERBS = {verb: room for room, (_, verbs) in ROOMS.items() for verb in verbs}
_PROG = "megatron-v2pe"
_ALONE = ("doctor", "recipes", "runs", "plan")  # harmless in every task of a step
_OTHER_RANKS_WAIT_S = 3.0
_OTHER_NODES_WAIT_S = 10.0  # until torchrun there has heard that ranks elsewhere have ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: arguments without the program's name; the process's own when None.

    Returns:
        Exit code: the verb's own, 2 for bad input, 1 for an internal failure.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if was_refused():
            return 2
        rank = launcher().rank
        setup_logging(rank)
        quiet_dependencies()
        if not arguments or arguments[0] not in VERBS:
            return _no_verb(arguments)
        if arguments[0] not in _ALONE and not {"-h", "--help"} & set(arguments):
            require_known_starter()
        if is_under_torchrun():
            end_without_launcher()
        return _run_verb(_load(arguments[0]), arguments[1:])
    except V2PEError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _run_verb(module: ModuleType, arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{_PROG} {module.NAME}",
        description=module.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_intermixed_args(arguments))  # overrides before and after options


def _load(verb: str) -> ModuleType:
    return importlib.import_module(f"megatron_v2pe.cli.{VERBS[verb]}.{verb.replace('-', '_')}")


def _no_verb(arguments: Sequence[str]) -> int:
    """The overview of verbs, or the version: to stdout and 0 when asked for, else the overview to stderr and 2."""
    width = max(map(len, VERBS))
    verbs = "\n\n".join(
        "\n".join([f"{title}:", *(f"  {verb:<{width}}  {summary}" for verb, summary in verbs.items())])
        for title, verbs in ROOMS.values()
    )
    usage = (
        f"usage: {_PROG} VERB ...\n\n{verbs}\n\n`{_PROG} VERB --help` explains a verb.\n"
        f"`{_PROG} --version` names the version.\nExample: {_PROG} doctor\n"
    )
    if arguments and arguments[0] == "--version":
        sys.stdout.write(f"{_PROG} {__version__}\n")
        return 0
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage)
        return 0
    problem = f"unknown verb {shortened(arguments[0])}" if arguments else "no verb given"
    near = difflib.get_close_matches(arguments[0], VERBS, n=1) if arguments else []
    problem += f"; did you mean {near[0]}?" if near else ""
    sys.stderr.write(f"{usage}\n{_PROG}: {problem}\n")
    return 2


def _report(error: V2PEError) -> int:
    """One message for a run of many ranks, and none lost.

    Mistakes in the configuration are found by every rank at once, and rank 0 says so. Another rank may be
    the only one to meet a bad file; it gives rank 0 the time to speak first, in which torchrun ends the rest.
    """
    # Of a launcher that is itself the mistake only the message can be given.
    try:
        rank, local_rank = launcher().rank, launcher().local_rank
    except V2PEError:
        rank = local_rank = 0
    if rank != 0:
        time.sleep(_OTHER_RANKS_WAIT_S if rank == local_rank else _OTHER_NODES_WAIT_S)
    report_to_torchrun(f"rank {rank}: {error}")
    if not error.is_final or refuse(str(error)):
        where = f"rank {rank}: " if rank else ""
        sys.stderr.write(f"{_PROG}: {where}{error}\n")
        sys.stderr.flush()
    return 2
