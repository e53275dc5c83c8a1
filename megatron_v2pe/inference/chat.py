"""A checkpoint one can talk to: messages with images and videos in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megatron_v2pe.checkpoint.model_source import require_source, source_side_files
from megatron_v2pe.config.arch.architecture import read_architecture
from megatron_v2pe.config.schema import DataConfig, ParallelConfig, RunConfig
from megatron_v2pe.config.trained_settings import answer_data
from megatron_v2pe.core.env import launcher
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.data.media.normalization import NORMALIZATION
from megatron_v2pe.data.samples.settings import sample_settings, with_system
from megatron_v2pe.data.text.answers import AnswerHeader
from megatron_v2pe.inference.beams import Beam, search
from megatron_v2pe.inference.cache.memory import KVKind, PlanPrefill
from megatron_v2pe.inference.chunks import DEFAULT_CHUNK_TOKENS
from megatron_v2pe.inference.engine import Answer, Engine, ForcedToken, OnProgress
from megatron_v2pe.inference.prompts import messages as messages_module
from megatron_v2pe.inference.prompts.messages import Message
from megatron_v2pe.inference.prompts.prompt import Prompt
from megatron_v2pe.inference.prompts.stride import StrideChoice, choose_stride
from megatron_v2pe.inference.sampling import GREEDY, Sampling
from megatron_v2pe.inference.text_stream import TextStream
from megatron_v2pe.parallel.plan import resolve

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How a checkpoint is loaded to be talked to.

    Attributes:
        stride: position units that a visual token advances; None takes the checkpoint's own.
        system: system text of conversations that bring none; None takes the checkpoint's own.
        dtype: compute dtype.
        max_tokens: longest prompt.
        max_tiles: most tiles of an image, thumbnail excluded; None takes the checkpoint's own.
        max_frames: most frames of a video.
        parallel: sizes of the parallel axes; their product must be the number of processes.
        chunk_tokens: longest prefill chunk.
        kv: how keys and values are stored.
        keep_tokens: tokens of earlier documents that are kept for further questions about them.
        plan_prefill: the planner's part of the check whether a prompt fits into memory, see `memory_check`.
    """

    stride: int | None = None
    system: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_tokens: int = 1_100_000
    max_tiles: int | None = None
    max_frames: int = 20
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    kv: KVKind = "model"
    keep_tokens: int = 0
    plan_prefill: PlanPrefill | None = None


class Chat:
    """An engine with the checkpoint's template, tokenizer, tiling and stride; all ranks of a replica call it alike.

    Args:
        checkpoint: folder of `import-hf` or of a run, or a Hugging Face folder.
        options: see `ChatOptions`.

    Attributes:
        stride: which stride is used, and why.
        header: what answers begin with, by the template; no part of their text.

    Raises:
        CheckpointError: not a checkpoint folder, one of an unknown family, or without a tokenizer.
        ConfigError: the stride is out of range, the template is unknown, or the sizes do not fit.
    """

    def __init__(self, checkpoint: str | Path, options: ChatOptions | None = None) -> None:
        options = options or ChatOptions()
        parallel = options.parallel
        if resolve(parallel, launcher().world_size).dp > 1:
            raise ConfigError(
                f"{launcher().world_size} processes were started for one answer, but --tp * --pp * --cp is "
                f"{parallel.tp} * {parallel.pp} * {parallel.cp}; start as many processes as their product"
            )
        require_source(checkpoint)
        hf_folder = source_side_files(checkpoint)
        self.arch = read_architecture(hf_folder)
        self.stride: StrideChoice = choose_stride(self.arch, options.stride)
        data = answer_data(
            hf_folder,
            max_dynamic_patch=options.max_tiles,
            max_sample_tokens=options.max_tokens,
            max_num_frame=options.max_frames,
            min_num_frame=min(DataConfig().min_num_frame, options.max_frames),
        )
        settings = with_system(sample_settings(RunConfig(data=data), self.arch, hf_folder), options.system)
        # As many frames as there may be, the middle of each interval: a question has one prompt.
        video = replace(settings.media.video, min_frames=settings.media.video.max_frames, sampling="middle")
        self.settings = replace(settings, media=replace(settings.media, video=video))
        self.tokenizer = self.settings.text.tokenizer
        stop_token = self.settings.text.template.stop_token
        self.stop_ids = frozenset({self.tokenizer.eos_id, self.tokenizer.token_id(stop_token)})
        self.header = AnswerHeader(self.tokenizer, self.settings.text.template)
        self.checkpoint = Path(checkpoint)
        self.engine = Engine.load(
            checkpoint,
            mode=self.stride.mode,
            norm=NORMALIZATION[data.normalize_type],
            dtype=options.dtype,
            parallel=parallel,
            chunk_tokens=options.chunk_tokens,
            kv=options.kv,
            keep_tokens=options.keep_tokens,
            plan_prefill=options.plan_prefill,
        )

    def set_stride(self, asked: int | None) -> None:
        """Answer with another stride from now on.

        Raises:
            ConfigError: out of range, or the model was loaded for whole positions only.
        """
        choice = choose_stride(self.arch, asked)
        if choice.mode != self.stride.mode and self.arch.position_mode == "default":
            raise ConfigError(
                f"the model was loaded for {'whole positions' if self.stride.mode == 'default' else 'strides'}, and "
                "this checkpoint rotates differently otherwise; start again with or without --stride"
            )
        self.stride = choice

    def prompt(
        self, messages: Sequence[Message], *, stride: int | None = None, system: str | None = None
    ) -> Prompt:
        """See `messages.build_prompt`; with the checkpoint's stride unless another is named."""
        chosen = self.stride.stride if stride is None else stride
        return messages_module.build_prompt(messages, settings=self.settings, stride=chosen, system=system)

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling = GREEDY,
        *,
        on_progress: OnProgress | None = None,
    ) -> Reply:
        """An answer to the last message; iterate it for its text.

        Raises:
            ConfigError: placeholders and attachments differ in number, or the prompt is too long.
            DataError: an image cannot be read.
        """
        return Reply(self, self.prompt(messages), sampling, on_progress)

    def answer(
        self,
        question: str,
        images: Sequence[str] = (),
        videos: Sequence[str] = (),
        *,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str]:
        """The pieces of an answer to one question; joined they are the decoded answer."""
        message = Message(role="human", text=question, images=tuple(images), videos=tuple(videos))
        return iter(self.reply([message], sampling))

    def best(self, messages: Sequence[Message], sampling: Sampling) -> list[tuple[str, Beam]]:
        """The best answers of a beam search, the best first."""
        beams = search(self.engine, self.prompt(messages), sampling=sampling, stop_ids=self.stop_ids)
        texts = []
        for beam in beams:
            stream = TextStream(self.tokenizer, sampling.stop, self.header)
            stream.finish(beam.tokens)
            texts.append(stream.text)
        return list(zip(texts, beams, strict=True))

    def score(self, messages: Sequence[Message], answer: str) -> list[ForcedToken]:
        """Probability of a given answer, token by token, the template's answer header and stop token included.

        Raises:
            ConfigError: the answer is empty.
        """
        if not answer:
            raise ConfigError("the answer to be scored is empty; give some text")
        tokens = self.tokenizer.encode(answer, add_bos=False)
        stop = self.tokenizer.token_id(self.settings.text.template.stop_token)
        return self.engine.score(self.prompt(messages), [*self.header.ids, *tokens, stop])


class Reply:
    """An answer on its way: iterate its text, then read what it took.

    Attributes:
        text: what was given out so far.
        finish_reason: `stop` at a stop token or text, `length` at the longest answer; None before.
    """

    def __init__(
        self, chat: Chat, prompt: Prompt, sampling: Sampling, on_progress: OnProgress | None = None
    ) -> None:
        self._chat, self.prompt, self._sampling, self._on_progress = chat, prompt, sampling, on_progress
        self.answer: Answer | None = None
        self.text, self.finish_reason = "", None  # type: tuple[str, FinishReason | None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far, a stop token included."""
        return 0 if self.answer is None else len(self.answer.steps)

    @property
    def last_position(self) -> int:
        """Whole position of the last token that was fed."""
        return self.prompt.layout.next_position - 1 + max(0, self.num_tokens - 1)

    @property
    def summary(self) -> str:
        """One line: tokens, visual tokens, what was known already, positions, and why the answer ended."""
        layout, reused = self.prompt.layout, 0 if self.answer is None else self.answer.reused_tokens
        text = (
            f"prompt {layout.num_tokens} tokens ({layout.num_visual_tokens} visual, {reused} known already), positions "
            f"0..{self.last_position}; answer {self.num_tokens} tokens, ended by {self.finish_reason}"
        )
        error = 0.0 if self.answer is None else self.answer.cache.relative_error
        return f"{text}; 8-bit keys and values are off by {error:.2%}" if error else text

    def __iter__(self) -> Iterator[str]:
        """Yield pieces of text; closing the iterator early keeps what was computed for a further question."""
        chat, engine = self._chat, self._chat.engine
        stream = TextStream(chat.tokenizer, self._sampling.stop, chat.header)
        self.answer = engine.begin(
            self.prompt, sampling=self._sampling, stop_ids=chat.stop_ids, on_progress=self._on_progress
        )
        try:
            while not self.answer.is_done:
                piece = stream.feed(self.answer.answer)
                if piece:
                    self.text += piece
                    yield piece
                if stream.is_stopped:
                    break
                engine.advance([self.answer])
            piece = stream.finish(self.answer.answer)
            self.text += piece
            ended = stream.is_stopped or self.answer.steps[-1].token in self.answer.stop_ids
            self.finish_reason = "stop" if ended else "length"
            if piece:
                yield piece
        finally:
            engine.finish(self.answer)


def with_reply(messages: Sequence[Message], reply: Reply) -> list[Message]:
    """The conversation with an answer that was given, for a further question."""
    return [*messages, Message(role="gpt", text=reply.text)]
