"""The ranks that answer: rank 0 takes requests and says what is done next, all of them do it.

    each round    rank 0 -> all   {"admit": request or nothing, "drop": numbers, "end": no more}
                  one step of the prefill of the newest request
                  one token of every request whose prefill is complete, all in one forward pass

A long prompt is prefilled chunk by chunk, so other answers continue in between. A request that cannot be answered ends
alone. A failure that is no mistake of a request ends the server: ranks that no longer agree must not continue.
"""

from __future__ import annotations

import base64
import json
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_v2pe.core.errors import ConfigError, DataError, V2PEError
from megatron_v2pe.inference.chat import Chat
from megatron_v2pe.inference.engine import Answer, Step
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.stride import choose_stride
from megatron_v2pe.inference.serve.jobs import Inbox, Job
from megatron_v2pe.inference.serve.metrics import Metrics
from megatron_v2pe.inference.serve.wire import ChatRequest, Piece, RequestError
from megatron_v2pe.inference.text_stream import TextStream
from megatron_v2pe.parallel.replica import agree_on_problem, from_leader

_IDLE_SECONDS = 1.0  # between rounds without work; the other ranks wait in a collective meanwhile


@dataclass(eq=False)
class _Choice:
    """One answer to a request.

    Attributes:
        index: among the answers to the request.
        answer: its tokens.
        stream: its text so far.
        reported: tokens whose log-probabilities were given out.
        is_complete: no more tokens are wanted.
    """

    index: int
    answer: Answer
    stream: TextStream
    reported: int = 0
    is_complete: bool = False


@dataclass(eq=False)
class _Running:
    """A request that is being answered, on every rank.

    Attributes:
        number: of the job.
        request: what is asked.
        prefill: steps of its prefill, until it is complete.
        choices: its answers, once its prefill is complete.
        files: made of what came with the request.
    """

    number: int
    request: ChatRequest
    prefill: Generator[tuple[int, int], None, list[Answer]] | None = None
    choices: list[_Choice] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class Worker:
    """One rank of the server.

    Args:
        chat: the model; every rank has loaded its part.
        inbox: requests; on rank 0, None elsewhere.
        metrics: on rank 0, None elsewhere.
        max_running: answers that are made at a time; a request may want several.
    """

    def __init__(self, chat: Chat, *, inbox: Inbox | None, metrics: Metrics | None, max_running: int) -> None:
        self.chat, self.inbox, self.metrics = chat, inbox, metrics
        self.max_running = max_running
        self._jobs: dict[int, Job] = {}  # rank 0
        self._running: dict[int, _Running] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="v2pe-serve-")

    def run(self) -> None:
        """Answer until the inbox drains and is empty."""
        with self._folder:
            while self._round():
                pass

    def _round(self) -> bool:
        order = self._order()
        if order["end"]:
            return False
        for number in order["drop"]:
            self._end(number)
        if order["admit"] is not None:
            self._admit(order["admit"]["number"], ChatRequest.from_json(order["admit"]["request"]))
        self._prefill_some()
        self._advance_all()
        return True

    def _order(self) -> dict[str, Any]:
        """What all ranks do in this round."""
        order: dict[str, Any] = {}
        if self.inbox is not None:
            order = self._plan(self.inbox)
        content = from_leader(json.dumps(order).encode(), ranks=self.chat.engine.ranks)
        return json.loads(content)

    def _plan(self, inbox: Inbox) -> dict[str, Any]:
        if not self._running:
            inbox.wait(_IDLE_SECONDS)
        drop = [number for number, job in self._jobs.items() if job.is_cancelled]
        admit = None
        is_prefilling = any(running.prefill is not None for running in self._running.values())
        kept = [running for number, running in self._running.items() if number not in drop]
        if not is_prefilling:
            job = inbox.take(self.max_running - sum(running.request.num_choices for running in kept))
            if job is not None:
                self._jobs[job.number] = job
                admit = {"number": job.number, "request": job.request.to_json()}
        if self.metrics is not None:
            self.metrics.note_load(waiting=inbox.num_waiting, running=len(self._running))
        end = inbox.is_draining and not self._running and admit is None and inbox.num_waiting == 0
        return {"admit": admit, "drop": drop, "end": end}

    def _admit(self, number: int, request: ChatRequest) -> None:
        """Build the prompt on all ranks and start its prefill, or report why that cannot be."""
        running = _Running(number, request)
        self._running[number] = running
        problem, prompt, stride = "", None, self.chat.stride.stride
        try:
            if request.stride is not None:
                stride = self._stride(request.stride)
            prompt = self._prompt(running, stride)
        except V2PEError as error:
            problem = str(error)
        problem = agree_on_problem(problem, ranks=self.chat.engine.ranks)
        if problem or prompt is None:
            self._fail(number, problem)
            return
        job = self._jobs.get(number)
        if job is not None:
            job.usage.prompt, job.usage.visual = prompt.layout.num_tokens, prompt.layout.num_visual_tokens
            job.usage.stride = stride
        running.prefill = self.chat.engine.begin_stepwise(
            prompt, samplings=request.samplings, stop_ids=self.chat.stop_ids, num_top=request.num_top or 0
        )

    def _stride(self, asked: int) -> int:
        choice = choose_stride(self.chat.arch, asked, option="stride")
        if choice.mode != self.chat.stride.mode and self.chat.arch.position_mode == "default":
            raise ConfigError(
                f"stride {asked}: this server was started without a stride for a checkpoint that was trained without "
                "V2PE, and rotates whole positions only"
            )
        return choice.stride

    def _prompt(self, running: _Running, stride: int) -> Prompt:
        paths = [self._file(running, index) for index in range(len(running.request.attachments))]
        messages = [
            replace(
                message,
                images=tuple(paths[int(index)] for index in message.images),
                videos=tuple(paths[int(index)] for index in message.videos),
            )
            for message in running.request.messages
        ]
        return self.chat.prompt(messages, stride=stride, system=running.request.system)

    def _file(self, running: _Running, index: int) -> str:
        attachment = running.request.attachments[index]
        if attachment.path:
            return attachment.path
        path = Path(self._folder.name) / f"request_{running.number}_{index}{attachment.suffix}"
        running.files.append(path)
        try:
            path.write_bytes(base64.b64decode(attachment.content))
        except OSError as error:
            raise DataError(f"an image of the request cannot be kept ({error.strerror})") from None
        return str(path)

    def _prefill_some(self) -> None:
        for running in list(self._running.values()):
            if running.prefill is None:
                continue
            try:
                next(running.prefill)
            except StopIteration as end:
                running.prefill = None
                stop, chat = running.request.sampling.stop, self.chat
                running.choices = [
                    _Choice(index, answer, TextStream(chat.tokenizer, stop, chat.header))
                    for index, answer in enumerate(end.value)
                ]
                self._note_first_token(running)
                self._give_out(running, running.choices)
            except V2PEError as error:  # the engine raises it on all ranks alike
                self._fail(running.number, str(error))
            return

    def _advance_all(self) -> None:
        pending = {
            number: [choice for choice in running.choices if not choice.is_complete]
            for number, running in self._running.items()
        }
        answers = [choice.answer for choices in pending.values() for choice in choices]
        if not answers:
            return
        started = time.monotonic()
        self.chat.engine.advance(answers)
        if self.metrics is not None:
            self.metrics.note_tokens(len(answers), time.monotonic() - started)
        for number, choices in pending.items():
            if choices:
                self._give_out(self._running[number], choices)

    def _note_first_token(self, running: _Running) -> None:
        job = self._jobs.get(running.number)
        if job is not None:
            job.usage.cached = running.choices[0].answer.reused_tokens
            if self.metrics is not None:
                self.metrics.note_first_token(time.monotonic() - job.arrived, job.usage)

    def _give_out(self, running: _Running, choices: Sequence[_Choice]) -> None:
        """What the newest token of some answers adds to their texts; a request whose answers are complete ends."""
        job = self._jobs.get(running.number)
        if job is not None:
            job.usage.generated = sum(len(choice.answer.steps) for choice in running.choices)
            job.usage.last_position = max(choice.answer.steps[-1].position for choice in running.choices)
        for choice in choices:
            piece = self._piece(running, choice)
            if job is not None and (piece.text or piece.tokens or piece.finish_reason):
                job.deliver(piece)
        if all(choice.is_complete for choice in running.choices):
            self._end(running.number)

    def _piece(self, running: _Running, choice: _Choice) -> Piece:
        answer, stream = choice.answer, choice.stream
        text, reason = stream.feed(answer.answer), None
        choice.is_complete = answer.is_done or stream.is_stopped
        if choice.is_complete:
            text += stream.finish(answer.answer)
            stopped = stream.is_stopped or answer.steps[-1].token in answer.stop_ids
            reason = "stop" if stopped else "length"
        tokens = self._logprobs(running, choice)
        return Piece(index=choice.index, text=text, tokens=tokens, finish_reason=reason)

    def _logprobs(self, running: _Running, choice: _Choice) -> tuple[dict[str, Any], ...]:
        if running.request.num_top is None or running.number not in self._jobs:
            return ()
        new = choice.answer.steps[choice.reported : len(choice.answer.answer)]
        choice.reported += len(new)
        return tuple(self._token_data(step) for step in new)

    def _token_data(self, step: Step) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.chat.tokenizer.decode([token])
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        top = [entry(token, logprob) for token, logprob in step.top]
        return {**entry(step.token, step.logprob), "top_logprobs": top}

    def _fail(self, number: int, problem: str) -> None:
        job = self._jobs.get(number)
        if job is not None:
            job.deliver(RequestError(400, "cannot_answer", problem))
        self._end(number)

    def _end(self, number: int) -> None:
        running = self._running.pop(number, None)
        self._jobs.pop(number, None)
        if running is None:
            return
        if (
            running.choices
        ):  # the prompt is in all of them; a conversation continues the first one at least cost
            self.chat.engine.finish(running.choices[0].answer)
        for path in running.files:
            path.unlink(missing_ok=True)
