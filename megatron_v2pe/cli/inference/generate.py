"""`generate`: one answer to a question about images and videos, streamed as it is made."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from megatron_v2pe.cli.arguments import check_files
from megatron_v2pe.cli.inference.arguments import (
    add_model_arguments,
    add_sampling_arguments,
    chat_options,
    sampling_of,
)
from megatron_v2pe.core.env import launcher

if TYPE_CHECKING:
    from megatron_v2pe.inference.chat import Chat
    from megatron_v2pe.inference.prompts.messages import Message
    from megatron_v2pe.inference.sampling import Sampling

NAME = "generate"
HELP = """answer a question about images and videos

Example:  megatron-v2pe generate ckpt --image page1.png --image page2.png "What is the total?"

A long prompt is cut over processes (--cp), a large model too (--tp, --pp):
    torchrun --nproc-per-node 8 -m megatron_v2pe generate ckpt --cp 8 --image scan.png "What is the total?"

The stride is the checkpoint's own unless --stride names another; stderr says which is used. Write <image> or <video> in
the question where each belongs, or leave it out to have them put first. --save-session DIR keeps the document on disk;
--session DIR asks further without computing it again."""

_KEEP_TOKENS = 2**40  # one document and its answer, whatever their length


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_model_arguments(parser)
    parser.add_argument("question", help="text of the question")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="repeat for several")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="repeat for several")
    add_sampling_arguments(parser)
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search of N beams")
    parser.add_argument("--num-answers", type=int, default=1, metavar="N", help="print the N best beams")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="of beams: log-probability / tokens ** P"
    )
    parser.add_argument(
        "--score",
        metavar="ANSWER",
        help="do not generate; print each token of this answer, its log-probability and the most probable token there",
    )
    parser.add_argument(
        "--session", metavar="DIR", help="ask further about the document that was saved there"
    )
    parser.add_argument(
        "--save-session", metavar="DIR", help="keep document and conversation in this new folder"
    )


def run(args: argparse.Namespace) -> int:
    """Answer; the text goes to stdout, everything else to stderr."""
    from megatron_v2pe.inference.chat import Chat
    from megatron_v2pe.inference.prompts.messages import Message
    from megatron_v2pe.inference.session import load_session
    from megatron_v2pe.parallel.topology import shutdown

    beams = {
        "num_beams": args.num_beams,
        "num_answers": args.num_answers,
        "length_penalty": args.length_penalty,
    }
    sampling = sampling_of(args, **beams)
    keeps = bool(args.session or args.save_session)
    options = chat_options(args, keep_tokens=_KEEP_TOKENS if keeps else 0)
    check_files(args)
    chat = Chat(args.checkpoint, options)
    _say(chat.stride.reason)
    messages = load_session(chat.engine, args.session, checkpoint=args.checkpoint) if args.session else []
    question = Message(role="human", text=args.question, images=tuple(args.image), videos=tuple(args.video))
    messages = [*messages, question]
    if args.score is not None:
        _score(chat, messages, args.score)
    elif args.num_beams > 1:
        _beams(chat, messages, sampling)
    else:
        _answer(chat, messages, sampling, save=args.save_session)
    shutdown()
    return 0


def _answer(chat: Chat, messages: list[Message], sampling: Sampling, *, save: str | None) -> None:
    from megatron_v2pe.cli.inference.arguments import prefill_progress
    from megatron_v2pe.inference.chat import with_reply
    from megatron_v2pe.inference.session import save_session

    with prefill_progress(is_shown=launcher().rank == 0) as on_progress:
        reply = chat.reply(messages, sampling, on_progress=on_progress)
        for piece in reply:
            _write(piece)
    _write("\n")
    _say(reply.summary)
    if save:
        save_session(chat.engine, save, checkpoint=chat.checkpoint, messages=with_reply(messages, reply))


def _beams(chat: Chat, messages: list[Message], sampling: Sampling) -> None:
    for text, beam in chat.best(messages, sampling):
        _say(f"score {beam.score:.4f}, log-probability {beam.logprob:.4f}, {len(beam.tokens)} tokens")
        _write(text + "\n")


def _score(chat: Chat, messages: list[Message], answer: str) -> None:
    """One line of json for each token, then whether greedy decoding would give the answer."""
    forced = chat.score(messages, answer)
    for token in forced:
        texts = {
            "text": chat.tokenizer.decode([token.token]),
            "argmax_text": chat.tokenizer.decode([token.argmax]),
        }
        _write(
            json.dumps({"token": token.token, "logprob": token.logprob, "argmax": token.argmax, **texts})
            + "\n"
        )
    matches = sum(token.token == token.argmax for token in forced)
    _say(
        f"{matches} of {len(forced)} tokens are the most probable ones; log-probability of the answer "
        f"{sum(token.logprob for token in forced):.4f}"
    )


def _write(text: str) -> None:
    if launcher().rank == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def _say(text: str) -> None:
    if launcher().rank == 0:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
