"""`lmms`: lmms-eval's tasks with this model, on one rank or many."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_v2pe.cli.arguments import (
    add_parallel_sizes,
    add_verify_checkpoint,
    check_files,
    parallel_config,
)

NAME = "lmms"
HELP = """run tasks of lmms-eval (extra `lmms`) in process: a second judge of the same model.

Stock tasks, or v2pe_chartqa, v2pe_docvqa_val, v2pe_infovqa_val, v2pe_pope, v2pe_scienceqa_img, which ask as the V2PE
release does. Under torchrun all processes are one replica (--tp, --pp, --cp). To share questions over replicas, or to
survive kills, record and replay instead:

  lmms_eval --model megatron_v2pe --model_args record=Q --tasks chartqa
  megatron-v2pe evaluate CKPT --benchmark lmms --data-dir Q --stride 64 --out O
  lmms_eval --model megatron_v2pe --model_args rows=O --tasks chartqa

Example: megatron-v2pe lmms step_00000400 --tasks v2pe_chartqa --stride 64 --out eval/lmms"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("checkpoint", help="folder of import-hf or of a run, or a Hugging Face folder")
    parser.add_argument("--tasks", required=True, metavar="A,B", help="tasks of lmms-eval")
    parser.add_argument("--stride", default="", metavar="S", help="default: the checkpoint's own")
    parser.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="further task files"
    )
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="first N documents of each task")
    parser.add_argument("--out", required=True, help="folder for results.json and the task files")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    add_parallel_sizes(parser)
    add_verify_checkpoint(parser)


def run(args: argparse.Namespace) -> int:
    """Judge; results go to stdout as json."""
    from contextlib import closing

    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.core.files import writable_folder, write_atomic
    from megatron_v2pe.evaluation.jobs.engine_adapter import ModelAnswerer, own_strides
    from megatron_v2pe.evaluation.lmms.launch import judge

    here = check_files(args)
    with closing(
        ModelAnswerer(args.checkpoint, dtype=args.dtype, parallel=parallel_config(args))
    ) as answerer:
        settings = own_strides(answerer.arch, args.stride, option="--stride")
        if len(settings) > 1:
            raise ConfigError(f"--stride is {args.stride!r}, but lmms-eval judges one stride at a time")
        out = writable_folder(args.out, field="--out")
        results = judge(
            [name.strip() for name in args.tasks.split(",") if name.strip()],
            answerer,
            settings[0],
            rank=here.rank,
            include=[Path(name) for name in args.include_path],
            limit=args.limit,
            own_tasks=out / "tasks",
        )
    if results is not None:
        text = json.dumps({"stride": settings[0].name, "results": results}, indent=1, default=str)
        write_atomic(out / "results.json", text + "\n")
        sys.stdout.write(text + "\n")
    return 0
