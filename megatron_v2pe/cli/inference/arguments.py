"""What `generate`, `chat` and `serve` share: how a checkpoint is loaded, and how answers are made."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron_v2pe.cli.arguments import add_parallel_sizes, add_verify_checkpoint, parallel_config

if TYPE_CHECKING:
    from megatron_v2pe.inference.chat import ChatOptions
    from megatron_v2pe.inference.engine import OnProgress
    from megatron_v2pe.inference.sampling import Sampling


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the model."""
    from megatron_v2pe.inference.cache.memory import KV_KINDS
    from megatron_v2pe.inference.chunks import DEFAULT_CHUNK_TOKENS

    parser.add_argument("checkpoint", help="folder of import-hf or of a run, or a Hugging Face folder")
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="V2PE stride, 1..tokens per tile; default: the checkpoint's own",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system text of conversations that bring none; default: the one that the checkpoint was trained with",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1_100_000, metavar="N", help="longest prompt (default 1,100,000)"
    )
    parser.add_argument(
        "--max-dynamic-patch",
        type=int,
        metavar="N",
        help="most tiles per image; default: as the checkpoint was trained",
    )
    parser.add_argument(
        "--max-num-frame", type=int, default=20, metavar="N", help="most frames of a video (default 20)"
    )
    parser.add_argument(
        "--chunk-tokens",
        type=int,
        default=DEFAULT_CHUNK_TOKENS,
        metavar="N",
        help=f"tokens that are prefilled at a time (default {DEFAULT_CHUNK_TOKENS})",
    )
    parser.add_argument(
        "--kv",
        choices=KV_KINDS,
        default="model",
        help="how keys and values are stored; 8 bits halve their memory, and the error is reported",
    )
    add_parallel_sizes(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="compute dtype")
    add_verify_checkpoint(parser)


def chat_options(args: argparse.Namespace, *, keep_tokens: int) -> ChatOptions:
    """The options of `add_model_arguments`."""
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.inference.chat import ChatOptions
    from megatron_v2pe.planning.answering import plan_prefill

    for name in ("max_tokens", "max_dynamic_patch", "max_num_frame", "chunk_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option} is {value}, but must be at least 1")
    return ChatOptions(
        stride=args.stride,
        system=args.system,
        dtype=args.dtype,
        max_tokens=args.max_tokens,
        max_tiles=args.max_dynamic_patch,
        max_frames=args.max_num_frame,
        parallel=parallel_config(args),
        chunk_tokens=args.chunk_tokens,
        kv=args.kv,
        keep_tokens=keep_tokens,
        plan_prefill=plan_prefill,
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of an answer; without any it is greedy."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)"
    )
    parser.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="no stop token before that many"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K most probable tokens"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the most probable tokens of that sum"
    )
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="draw from tokens of that share of the largest"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="of tokens of the answer so far"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer there; repeat for several"
    )


def sampling_of(args: argparse.Namespace, **more: object) -> Sampling:
    """The options of `add_sampling_arguments`, checked."""
    from megatron_v2pe.inference.sampling import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        **more,  # type: ignore[arg-type]
    )


@contextmanager
def prefill_progress(*, is_shown: bool) -> Iterator[OnProgress]:
    """A bar of prefilled tokens on a terminal; gone when the answer begins.

    Args:
        is_shown: on one rank of several.
    """
    from tqdm import tqdm

    with tqdm(desc="prefill", unit="token", leave=False, disable=None if is_shown else True) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        yield on_progress
