"""`plan`: what a run needs and how long a step takes, without a cluster."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from megatron_v2pe.cli.arguments import add_run_config, run_config
from megatron_v2pe.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron_v2pe.planning.request.inputs import PlanRequest

NAME = "plan"
HELP = """work out, on this machine, whether a run fits its GPUs, how long a step takes and what to change

This run:         megatron-v2pe plan run.yaml --gpus 32 --gpu-memory 80
Before import:    megatron-v2pe plan run.yaml --gpus 32 --arch 8B parallel.cp=8 model.recompute=full
Best layouts:     megatron-v2pe plan run.yaml --gpus 32 --arch 8B --search
1M evaluation:    megatron-v2pe plan run.yaml --gpus 8 --arch 2B --inference 1000000 --kv int8 parallel.cp=8

Weights, gradients and optimizer are exact; activations are what the modules allocate, operation by operation; times
follow from the stated rates of a GPU (--rate NAME=VALUE replaces one). Exit code 0: it fits, 1: it does not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is planned, for which GPUs, and what a pack is made of."""
    from megatron_v2pe.inference.cache.memory import KV_KINDS
    from megatron_v2pe.planning.request.hardware import GPUS

    add_run_config(parser)
    add = parser.add_argument
    add("--gpus", type=int, required=True, metavar="N", help="GPUs of the run")
    add("--gpu", choices=tuple(GPUS), default="h100", help="kind of GPU (default: h100)")
    add(
        "--gpu-memory",
        type=float,
        default=0.0,
        metavar="GB",
        help="memory of a GPU (default: the kind's own)",
    )
    add("--arch", metavar="SIZE|CONFIG_JSON", help="published size (2B) or config.json (default: the run's)")
    add(
        "--search",
        nargs="?",
        type=int,
        const=10,
        default=0,
        metavar="N",
        help="list the N best layouts (10 without N)",
    )
    add("--inference", type=int, default=0, metavar="TOKENS", help="plan answering a prompt of TOKENS")
    add(
        "--chunk-tokens",
        type=int,
        metavar="N",
        help="with --inference: tokens prefilled at a time (default 8192)",
    )
    add("--kv", choices=KV_KINDS, help="with --inference: how keys and values are stored")
    add("--json", action="store_true", help="print json instead of text")
    add("--rate", action="append", default=[], metavar="NAME=VALUE", help="replace a rate: gemm_share=0.6")
    _add_pack(parser)


def _add_pack(parser: argparse.ArgumentParser) -> None:
    pack = parser.add_argument_group("what a pack is made of").add_argument
    pack("--measure-data", action="store_true", help="read it from data.meta; measures the data if need be")
    pack(
        "--visual-share",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="share of visual tokens (default: 0.95)",
    )
    pack(
        "--supervised-share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="share of tokens with a label (default: 0.05)",
    )
    pack(
        "--documents",
        type=int,
        default=0,
        metavar="N",
        help="number of documents (default: as many of data.max_sample_tokens as fill a pack)",
    )
    pack(
        "--tiles",
        type=int,
        default=-1,
        metavar="N",
        help="number of tiles (default: what --visual-share gives)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 when it fits, 1 when it does not."""
    from megatron_v2pe.planning.command import run_plan

    text, fits = run_plan(_request(args))
    sys.stdout.write(text)
    return 0 if fits else 1


def _request(args: argparse.Namespace) -> PlanRequest:
    from megatron_v2pe.planning.request.inputs import PlanRequest
    from megatron_v2pe.planning.request.workload import Assumptions

    answering = {"chunk_tokens": args.chunk_tokens, "kv": args.kv}
    answering = {name: value for name, value in answering.items() if value is not None}
    if answering and not args.inference:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in answering)
        raise ConfigError(f"{options}: only for planning an answer; add --inference TOKENS, or omit it")
    if args.chunk_tokens is not None and args.chunk_tokens < 1:
        raise ConfigError(f"--chunk-tokens is {args.chunk_tokens}, must be 1 or more")
    return PlanRequest(
        config=run_config(args.config, args.overrides),
        gpus=args.gpus,
        arch=args.arch,
        gpu=args.gpu,
        gpu_memory=args.gpu_memory,
        rates=tuple(args.rate),
        assumptions=Assumptions(
            visual_share=args.visual_share,
            supervised_share=args.supervised_share,
            documents=args.documents,
            tiles=args.tiles,
        ),
        measure_data=args.measure_data,
        inference=args.inference,
        **answering,
        search=args.search,
        as_json=args.json,
    )
