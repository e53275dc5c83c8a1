"""`train`: fine-tune as a YAML file says, on this process or on all ranks of torchrun."""

from __future__ import annotations

import argparse

from megatron_v2pe.cli.arguments import add_run_config, run_config
from megatron_v2pe.core.env import launcher, prepare_gpu_environment
from megatron_v2pe.core.processes import start_worker_server

NAME = "train"
HELP = """fine-tune an imported checkpoint as RUN.yaml says

One process:    megatron-v2pe train run.yaml
Two ranks:      torchrun --standalone --nproc-per-node 2 -m megatron_v2pe train run.yaml parallel.cp=2
Other numbers:  megatron-v2pe train run.yaml optim.lr=1e-5 optim.lr_vision=1e-6 position.mode=v2pe_random
Growing batch:  megatron-v2pe train run.yaml optim.global_batch_size=32 'optim.batch_rampup=[8,8,2000]'

The run writes config.yaml, metrics.jsonl, tensorboard/ and checkpoints/ to runtime.run_dir, and continues from
its newest checkpoint when it is started again. docs/configuration.md explains every field.

SIGTERM, SIGUSR1, Ctrl-C, or a file RUN_DIR/stop end it after the current step with a checkpoint and
RUN_DIR/interrupted.json. The exit code is then 75; under torchrun it is 0, because torchrun would restart the ranks.
A rank that dies or hangs ends all; `torchrun --max-restarts N` starts them again from the newest checkpoint.
A file RUN_DIR/profile_now, or SIGUSR2 to a rank, traces the next steps into RUN_DIR/profile while the run continues."""

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: starting again continues


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_run_config(parser)
    parser.add_argument(
        "--verify-checkpoint",
        choices=("sizes", "full"),
        help="short for checkpoint.verify=...: what is checked of a checkpoint's files before it is loaded",
    )


def run(args: argparse.Namespace) -> int:
    """Train; mistakes are raised as ConfigError, DataError or CheckpointError."""
    verify = [f"checkpoint.verify={args.verify_checkpoint}"] if args.verify_checkpoint else []
    # Before torch is imported: a typo is reported in a blink.
    config = run_config(args.config, [*args.overrides, *verify])
    prepare_gpu_environment(config.runtime.run_dir, deterministic=config.runtime.deterministic)
    if config.data.num_workers:
        start_worker_server("megatron_v2pe.data.loader")  # beside the imports of this process

    from megatron_v2pe.train.monitoring.startup_watch import StartupWatch

    with StartupWatch(config.runtime.hang_timeout_s, rank=launcher().rank) as watch:
        import torch

        from megatron_v2pe.planning.request.hardware import known_peak_tflops
        from megatron_v2pe.preflight.disk import run_sizes
        from megatron_v2pe.train.loop import train
        from megatron_v2pe.train.setup import Outside

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        outside = Outside(sizes_of=run_sizes, peak_tflops=known_peak_tflops(device), watch=watch)
        reason = train(config, outside)
    return INTERRUPTED if reason and launcher().master is None else 0
