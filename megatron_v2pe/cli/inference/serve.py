"""`serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_v2pe.cli.arguments import check_files
from megatron_v2pe.cli.inference.arguments import add_model_arguments, chat_options
from megatron_v2pe.core.env import api_key, launcher

if TYPE_CHECKING:
    from megatron_v2pe.inference.serve.wire import Limits

NAME = "serve"
HELP = """answer requests of OpenAI's chat completions

Example:  megatron-v2pe serve ckpt --port 8000
    curl localhost:8000/v1/chat/completions -d '{"model": "ckpt", "messages": [{"role": "user", "content": "Hello"}]}'

Over several processes rank 0 listens and all of them answer:
    torchrun --nproc-per-node 8 -m megatron_v2pe serve ckpt --cp 8

Images come as base64 data: urls, or as files below --media-root. A request may name its own "stride". The server
listens on this machine only unless --host says otherwise, which needs a key (--api-key-file, or V2PE_API_KEY). SIGTERM
answers what is there and ends. Needs the extra: pip install 'megatron_v2pe[serve]'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000); 0 takes a free one")
    parser.add_argument("--name", default="", help="name of the model (default: that of the folder)")
    parser.add_argument(
        "--media-root", default="", metavar="DIR", help="folder of files that requests may name"
    )
    parser.add_argument(
        "--api-key-file", default="", metavar="FILE", help="file with the key that requests carry"
    )
    parser.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)"
    )
    parser.add_argument(
        "--max-running",
        type=int,
        default=8,
        metavar="N",
        help="answers that are made at a time, and most of one request, `n` (default 8)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="longest answer of a request (default 8192)",
    )
    parser.add_argument(
        "--max-images", type=int, default=4096, metavar="N", help="images of a request (default 4096)"
    )
    parser.add_argument(
        "--max-body-mb", type=int, default=512, metavar="N", help="size of a request (default 512 MiB)"
    )
    parser.add_argument(
        "--keep-tokens",
        type=int,
        default=2_000_000,
        metavar="N",
        help="tokens of documents that are kept for further questions (default 2,000,000)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    from megatron_v2pe.core.errors import ConfigError

    try:
        from megatron_v2pe.inference.serve.run import bind, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve needs {error.name}; pip install 'megatron_v2pe[serve]'") from None
    from megatron_v2pe.inference.chat import Chat
    from megatron_v2pe.parallel.topology import shutdown

    limits = _limits(args)
    key, options = _api_key(args), chat_options(args, keep_tokens=args.keep_tokens)
    listener = bind(args.host, args.port, api_key=key) if launcher().rank == 0 else None
    check_files(args)
    chat = Chat(args.checkpoint, options)
    serve(
        chat, listener, limits=limits, api_key=key, max_waiting=args.max_queue, max_running=args.max_running
    )
    shutdown()
    return 0


def _limits(args: argparse.Namespace) -> Limits:
    from megatron_v2pe.core.errors import ConfigError
    from megatron_v2pe.inference.serve.wire import Limits

    least = {
        "max_queue": 1,
        "max_running": 1,
        "max_new_tokens": 1,
        "max_images": 0,
        "max_body_mb": 1,
        "keep_tokens": 0,
    }
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least {bound}"
            )
    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port is {args.port}, but must lie in 0..65535")
    if args.media_root and not Path(args.media_root).is_dir():
        raise ConfigError(f"--media-root is {args.media_root}, which is no folder")
    return Limits(
        model=args.name or Path(args.checkpoint).resolve().name,
        media_root=args.media_root,
        max_new_tokens=args.max_new_tokens,
        default_new_tokens=min(256, args.max_new_tokens),
        max_choices=args.max_running,
        max_images=args.max_images,
        max_body_bytes=args.max_body_mb * 2**20,
    )


def _api_key(args: argparse.Namespace) -> str:
    from megatron_v2pe.core.errors import ConfigError

    if not args.api_key_file:
        return api_key()
    try:
        key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"--api-key-file {args.api_key_file}: cannot be read ({error.strerror})") from None
    if not key:
        raise ConfigError(f"--api-key-file {args.api_key_file}: is empty")
    return key
