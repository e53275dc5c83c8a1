"""Arguments of `megatron-v2pe plan`, and the request they ask."""

from __future__ import annotations

import argparse

from megatron_v2pe.config.load import load_run_config
from megatron_v2pe.planning.command import PlanRequest
from megatron_v2pe.planning.request.hardware import GPUS
from megatron_v2pe.planning.request.workload import Assumptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is planned, for which GPUs, and what a pack is made of."""
    add = parser.add_argument
    add("config", help="run configuration (YAML)")
    add("overrides", nargs="*", metavar="section.key=value", help="fields that replace the file's")
    add("--gpus", type=int, required=True, help="GPUs of the run")
    add("--gpu", choices=tuple(GPUS), default="h100", help="kind of GPU (h100)")
    add("--gpu-memory", type=float, default=0.0, metavar="GB", help="memory of a GPU (the kind's own)")
    add("--arch", metavar="SIZE|CONFIG_JSON", help="published size (2B) or config.json; default: the run's")
    add(
        "--search", nargs="?", type=int, const=10, default=0, metavar="N", help="list the N best layouts (10)"
    )
    add("--inference", type=int, default=0, metavar="TOKENS", help="plan answering a prompt of TOKENS")
    add("--json", action="store_true", help="print json")
    add("--rate", action="append", default=[], metavar="NAME=VALUE", help="replace a rate: gemm_share=0.6")
    pack = parser.add_argument_group("what a pack is made of").add_argument
    pack("--measure-data", action="store_true", help="take it from data.meta; measures the data if need be")
    pack("--visual-share", type=float, default=0.95, help="share of visual tokens (0.95)")
    pack("--supervised-share", type=float, default=0.05, help="share of tokens with a label (0.05)")
    pack("--documents", type=int, default=0, help="number of documents (of data.max_sample_tokens each)")
    pack("--tiles", type=int, default=-1, help="number of tiles (from --visual-share)")


def request(args: argparse.Namespace) -> PlanRequest:
    """Parsed arguments as a request.

    Raises:
        ConfigError: the configuration cannot be read, or a share is not one.
    """
    return PlanRequest(
        config=load_run_config(args.config, args.overrides),
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
        search=args.search,
        as_json=args.json,
    )
