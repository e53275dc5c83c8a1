"""`evaluate`: published benchmarks, or retrieval over lengths and depths; once per stride, with tables and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_v2pe.cli.arguments import (
    add_parallel_sizes,
    add_verify_checkpoint,
    check_files,
    parallel_config,
)
from megatron_v2pe.core.errors import ConfigError

NAME = "evaluate"
HELP = """answer a benchmark's questions, once per stride, and score the answers.

--benchmark NAME asks a published benchmark, whose files are in --data-dir (`check-data` says what belongs there):
mm-niah, mm-niah-1m, long-vqa, milebench, chartqa, docvqa, ai2d, infovqa, scienceqa, pope, mmmu-val, mmbench-en, seed-i,
mvbench, video-mme, mmlongbench. `score` scores the same folder again, `paper-table` puts it beside the paper's numbers.

--data FILE asks about long documents instead, and reports exact-match accuracy by length and depth. FILE is a jsonl
file (its images are in --root, or beside it) or a meta json, whose limits of tiles and frames come first. A record is a
conversation that ends with the expected answer, with id, length (tokens) and depth (0..1). Plain questions, records of
training data without length and depth, get exact, relaxed and contains scores and ANLS instead.

Without --stride the checkpoint's own is used. A stopped evaluation continues, with any number of processes. Under
torchrun, processes or groups of --tp, --pp, --cp share the questions. A question that cannot be answered (missing
image, out of memory) is a row with its error; the exit code is then 1.

Example: megatron-v2pe evaluate step_00000400 --benchmark mm-niah --data-dir MM-NIAH --stride 16,64 --out niah"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help="folder of import-hf or of a run, or a Hugging Face folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--benchmark", default="", metavar="NAME", help="a published benchmark")
    what.add_argument("--data", default="", help="questions: a .jsonl file or a meta .json")
    parser.add_argument(
        "--stride",
        "--strides",
        dest="strides",
        default="",
        metavar="S,S",
        help="comma list of 'default' and position units; default: the checkpoint's own",
    )
    parser.add_argument("--out", required=True, help="folder for answers, tables and pictures")
    add_parallel_sizes(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    add_verify_checkpoint(parser)
    published = parser.add_argument_group("with --benchmark")
    published.add_argument("--data-dir", metavar="DIR", help="folder of the benchmark's files")
    published.add_argument(
        "--sets", default="", metavar="A,B", help="tasks or sets; default: all that are there"
    )
    published.add_argument("--limit", type=int, default=0, metavar="N", help="first N questions of each set")
    published.add_argument(
        "--mode",
        choices=("generate", "forced"),
        default="generate",
        help="let the model answer (default), or score the gold answer token by token, as the release does at 1M",
    )
    published.add_argument(
        "--scoring", default="", metavar="MODE", help="release, original or clean; default: the benchmark's"
    )
    published.add_argument(
        "--letters", default="release", metavar="RULE", help="MileBench: release, single or fork"
    )
    published.add_argument("--retry-errors", action="store_true", help="ask again what ended with an error")
    own = parser.add_argument_group("with --data")
    own.add_argument(
        "--root", default="", metavar="FOLDER", help="images of a .jsonl file; default: where the file is"
    )
    own.add_argument("--metrics", default="", help="metrics.jsonl of the run, for a loss curve")
    own.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="longest answer")
    own.add_argument(
        "--system",
        metavar="TEXT",
        help="system text of questions that bring none; default: the one that the checkpoint was trained with",
    )
    own.add_argument(
        "--max-dynamic-patch",
        type=int,
        metavar="N",
        help="most tiles per image; default: as the checkpoint was trained",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate; the table goes to stdout."""
    from megatron_v2pe.inspection.figures import pyplot

    pyplot()  # a missing matplotlib is reported before the work
    return _run_benchmark(args) if args.benchmark else _run_retrieval(args)


def _run_benchmark(args: argparse.Namespace) -> int:
    from megatron_v2pe.evaluation.benchmarks.registry import find_benchmark
    from megatron_v2pe.evaluation.jobs.engine_adapter import ModelAnswerer, own_strides
    from megatron_v2pe.evaluation.jobs.job import JobOptions, run_job
    from megatron_v2pe.evaluation.jobs.report import problems

    benchmark = find_benchmark(args.benchmark, letters=args.letters)
    if not args.data_dir:
        raise ConfigError(
            f"--data-dir is missing; it names the folder of {benchmark.title}: {benchmark.download}"
        )
    if args.limit < 0:
        raise ConfigError(f"--limit is {args.limit}, but must be at least 1, or 0 for all")
    here = check_files(args)
    answerer = ModelAnswerer(args.checkpoint, dtype=args.dtype, parallel=parallel_config(args))
    options = JobOptions(
        checkpoint=Path(args.checkpoint),
        data_dir=Path(args.data_dir),
        out=Path(args.out),
        sets=tuple(name.strip() for name in args.sets.split(",") if name.strip()),
        limit=args.limit,
        is_forced=args.mode == "forced",
        retry_errors=args.retry_errors,
        settings=f"{args.mode}, {args.dtype}",
        mode=args.scoring,
        is_first=here.rank == 0,
        trained_length=answerer.arch.trained_length,
        tokens_per_tile=answerer.arch.tokens_per_tile,
    )
    text, scores = run_job(benchmark, own_strides(answerer.arch, args.strides), answerer, options)
    if here.rank != 0:
        return 0
    sys.stdout.write(text + "\n")
    for line in (found := problems(scores)):
        sys.stderr.write(f"megatron-v2pe: {line}\n")
    return 1 if found else 0


def _run_retrieval(args: argparse.Namespace) -> int:
    from megatron_v2pe.checkpoint.model_source import source_side_files
    from megatron_v2pe.config.trained_settings import answer_data
    from megatron_v2pe.evaluation.jobs.engine_adapter import own_strides
    from megatron_v2pe.evaluation.retrieval.answerer import EngineAnswerer
    from megatron_v2pe.evaluation.retrieval.plain_questions import (
        METRICS,
        check_items,
        write_plain_scores,
        write_scores,
    )
    from megatron_v2pe.evaluation.retrieval.questions import read_items
    from megatron_v2pe.evaluation.retrieval.runner import (
        claim_folder,
        describe_subject,
        run_strides,
        write_evaluation,
    )

    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {args.max_new_tokens}, but must be at least 1")
    here = check_files(args)
    data = answer_data(source_side_files(args.checkpoint), max_dynamic_patch=args.max_dynamic_patch)
    answerer = EngineAnswerer(
        args.checkpoint,
        data=data,
        system=args.system,
        parallel=parallel_config(args),
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
    )
    settings = own_strides(answerer.arch, args.strides)
    items, problems = check_items(
        read_items(args.data, root=args.root), answerer, max_new_tokens=args.max_new_tokens
    )
    is_plain = not items[0].length
    METRICS["anls"]("a", "a")  # a missing package is reported before the work
    options = f"{args.dtype}, {args.max_new_tokens} new tokens, {data.max_dynamic_patch} tiles"
    options += "" if args.system is None else f", system text {args.system!r}"
    subject = describe_subject(args.checkpoint, args.data, options=options)
    folder = claim_folder(args.out, subject, is_writer=here.rank == 0)
    found = run_strides(items, settings=settings, answerer=answerer, folder=folder, problems=problems)
    if here.rank != 0:
        return 0
    if is_plain:
        text = write_plain_scores(found, folder=folder)
    else:
        text = write_evaluation(found, folder=folder, arch=answerer.arch, metrics_path=args.metrics)
        text += "\n" + write_scores(found, folder=folder)
    sys.stdout.write(text + "\n")
    return int(any(each.error for own in found.values() for each in own))
